"""Teacher caches: what comes back, what it costs, and what is refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compresskit.distill.batch import Batch, Dense, Draws, TopK
from compresskit.distill.teachers.cache import read, report, shard, source
from compresskit.distill.teachers.cache.draws import DrawsFormat
from compresskit.distill.teachers.cache.parse import parse
from compresskit.distill.teachers.cache.topk import TopKFormat
from compresskit.distill.teachers.cache.write import Written, write
from compresskit.distill.teachers.online import Online
from compresskit.errors import ModelError, RunError, SpecError, UnknownName
from compresskit.hf.tiny import random_model

VOCABULARY = 512
ROWS, LENGTH = 11, 9
PLACES = ROWS * (LENGTH - 1)


@pytest.fixture(scope="module")
def teacher() -> Online:
    return Online(random_model("llama"))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def belongs(over: torch.Tensor, /, **changes: Any) -> source.Source:
    of = source.Source.of(over, teacher="org/teacher", revision="r1", tokenizer="t" * 64)
    return of.model_copy(update=changes)


def written(
    folder: Path, teacher: Online, rows: torch.Tensor, form: str, **options: Any
) -> Written:
    # Three rows a shard: four files, the last one shorter.
    row_bytes = (LENGTH - 1) * parse(form).bytes_per_place(teacher.vocabulary)
    options = {"shard_bytes": 3 * row_bytes, "batch": 2, **options}
    return write(folder, teacher, rows, form=parse(form), belongs=belongs(rows), **options)


def batch(rows: torch.Tensor, *numbers: int) -> Batch:
    tokens = rows[list(numbers)]
    return Batch(tokens, torch.ones(tokens.shape), torch.tensor(numbers))


def dense_logprobs(rows: torch.Tensor) -> torch.Tensor:
    """float64 `[N, V]`, by the whole model in float64: not the path that the cache is written by."""
    model = random_model("llama", dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=rows).logits[:, :-1].flatten(0, 1).log_softmax(-1)


# What comes back


def test_top_k_of_a_row_is_the_same_whatever_the_batch(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5,store=float32")
    cache = read.open(tmp_path, wanted=belongs(rows))
    found = cache.targets(batch(rows, 10, 0, 4))
    assert isinstance(found, TopK) and cache.kind == "topk" and cache.tokens_read == 0
    exact = dense_logprobs(rows[[10, 0, 4]])
    best = exact.topk(5, -1)
    assert found.ids.equal(best.indices)
    torch.testing.assert_close(found.logprobs.double(), best.values, rtol=0, atol=2e-5)
    others = exact.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found.rest.double(), others, rtol=0, atol=2e-5)
    # Negative control: the rows of another batch are others.
    assert not found.ids.equal(cache.targets(batch(rows, 4, 10, 0)).ids)


def test_all_tokens_kept_teach_what_the_teacher_teaches_online(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    """Forward KL and its gradient, in float32; top-8 of 512 fails the same comparison."""
    told = teacher.targets(batch(rows, 7, 2))
    assert isinstance(told, Dense) and teacher.kind == "dense"
    student = torch.randn(len(told.hidden), VOCABULARY, generator=torch.Generator().manual_seed(2))

    def learned(logp: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = student.clone().requires_grad_()
        ours = logits.log_softmax(-1).gather(-1, ids)
        loss = (logp.exp() * (logp - ours)).sum(-1).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), gradient

    everything = torch.arange(VOCABULARY).expand(len(told.hidden), -1)
    online = learned(teacher.logprobs(told.hidden), everything)
    found = {}
    for k in (VOCABULARY, 8):
        written(tmp_path / str(k), teacher, rows, f"topk:k={k},store=float32")
        cached = read.open(tmp_path / str(k), wanted=belongs(rows)).targets(batch(rows, 7, 2))
        assert isinstance(cached, TopK)
        found[k] = learned(cached.logprobs, cached.ids)
    torch.testing.assert_close(found[VOCABULARY], online, rtol=1e-5, atol=1e-7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[8], online, rtol=1e-5, atol=1e-7)


def test_reconstruction_of_all_tokens_is_the_rounding_of_bfloat16(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    """Each log-probability is off by at most |logp| / 256; of such errors the KL is a second moment."""
    got = written(tmp_path, teacher, rows, f"topk:k={VOCABULARY}").manifest.reconstruction
    exact = dense_logprobs(rows)
    half_step = exact.abs() / 256
    # KL(p || p e^d / Z) = log E e^d - E d <= (max d - min d)^2 / 8 (Hoeffding's lemma).
    bound = ((2 * half_step.amax(-1)) ** 2 / 8).mean().item()
    assert got is not None and 0 < got["kl_nats"] < bound
    assert got["mass_beyond_k"] == 0
    # float32 must be far below it, or the number is not about rounding.
    fine = written(tmp_path / "f", teacher, rows, f"topk:k={VOCABULARY},store=float32").manifest
    assert fine.reconstruction is not None
    assert abs(fine.reconstruction["kl_nats"]) < got["kl_nats"] / 100


def test_reconstruction_is_the_kl_of_what_is_read_again(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    """Against numpy in float64 on what comes back, the tail spread over the other tokens."""
    got = written(tmp_path, teacher, rows, "topk:k=6").manifest.reconstruction
    back = read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, *range(ROWS)))
    assert isinstance(back, TopK) and got is not None
    exact = dense_logprobs(rows).numpy()
    kls = []
    for place in range(PLACES):
        given = np.full(VOCABULARY, np.exp(back.rest[place].item()) / (VOCABULARY - 6))
        given[back.ids[place].numpy()] = np.exp(back.logprobs[place].double().numpy())
        assert given.sum() == pytest.approx(1, abs=1e-6)
        kls.append((np.exp(exact[place]) * (exact[place] - np.log(given))).sum())
    assert got["kl_nats"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert got["mass_beyond_k"] == pytest.approx(back.rest.exp().mean().item(), rel=1e-5)


def test_tokens_that_the_teacher_rules_out_cost_nothing() -> None:
    logprobs = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    for form in (TopKFormat(k=2), TopKFormat(k=3), TopKFormat(k=4), DrawsFormat(n=8)):
        stored = form.pack(logprobs, torch.rand(1, form.uniforms(), dtype=torch.float64))
        errors = form.errors(logprobs, stored)
        assert all(value.isfinite().all() for value in errors.values())
        if isinstance(form, TopKFormat):
            assert errors["kl"].item() == pytest.approx(0, abs=1e-6)


# Draws

PROBS = torch.tensor([0.55, 0.25, 0.1, 0.06, 0.03, 0.01])
SIGMAS = 5.0
"""Over the checks here, a sound estimator fails one in 10,000 times, were it not seeded."""


def estimates(form: DrawsFormat, f: torch.Tensor, places: int) -> torch.Tensor:
    """float64 `[places]`: what draws of the same distribution make of the expectation of `f`."""
    logprobs = PROBS.log().expand(places, -1)
    uniforms = torch.rand(
        places, form.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    back = form.unpack(form.pack(logprobs, uniforms))
    return (back.weights.double() * f.double()[back.ids]).sum(-1)


def too_far(found: torch.Tensor, truth: float) -> bool:
    return bool((found.mean() - truth).abs() > SIGMAS * found.std() / len(found) ** 0.5)


@pytest.mark.parametrize("form", ["draws:n=12", "draws:n=3,power=0.7", "draws:n=5,power=1.2"])
def test_draws_are_unbiased_for_every_token(form: str) -> None:
    """Any f is a sum of indicators, so one test a token covers all of them: the mean of 20,000 places
    lies within five standard errors of the probability itself, which is the exact answer."""
    chosen = parse(form)
    assert isinstance(chosen, DrawsFormat)
    for token, probability in enumerate(PROBS.tolist()):
        found = estimates(chosen, torch.eye(len(PROBS))[token], 20_000)
        assert found.std() > 0
        assert not too_far(found, probability)


def test_a_top_k_that_forgets_the_rest_fails_the_test_of_draws() -> None:
    """The biased control: top-3, brought back to a sum of one, on the same distribution."""
    back = TopKFormat(k=3, store="float32").unpack(
        TopKFormat(k=3, store="float32").pack(PROBS.log()[None], torch.empty(1, 0))
    )
    weights = back.logprobs.double().softmax(-1)
    for token, probability in enumerate(PROBS.tolist()):
        estimate = (weights * (back.ids == token)).sum().expand(20_000)
        assert too_far(estimate, probability)


def test_the_expected_weight_is_exact_by_enumeration() -> None:
    """Two draws of three tokens: all nine outcomes with their probabilities, no chance involved."""
    probs = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for power in (1.0, 0.5):
        form = DrawsFormat(n=2, power=power)
        proposal = (probs**power) / (probs**power).sum()
        middles = proposal.cumsum(0) - proposal / 2
        mean = torch.zeros(3, dtype=torch.float64)
        for first in range(3):
            for second in range(3):
                uniforms = torch.stack((middles[first], middles[second]))[None]
                back = form.unpack(form.pack(probs.log().float()[None], uniforms))
                chance = proposal[first] * proposal[second]
                mean.scatter_add_(0, back.ids[0], chance * back.weights[0].double())
        torch.testing.assert_close(mean, probs, rtol=1e-6, atol=0)


def test_a_token_drawn_twice_stands_once() -> None:
    uniforms = torch.tensor([[0.1, 0.7, 0.2, 0.3]], dtype=torch.float64)
    back = DrawsFormat(n=4).unpack(DrawsFormat(n=4).pack(PROBS.log()[None], uniforms))
    assert back.ids.tolist() == [[0, 1, 0, 0]]
    assert back.weights.tolist() == [[0.75, 0.25, 0.0, 0.0]]


def test_draws_of_a_row_do_not_depend_on_its_batch(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    found = []
    for size, seed in ((1, 0), (5, 0), (5, 1)):
        folder = tmp_path / f"{size}-{seed}"
        written(folder, teacher, rows, "draws:n=12", batch=size, seed=seed)
        cached = read.open(folder, wanted=belongs(rows)).targets(batch(rows, 3, 8))
        assert isinstance(cached, Draws)
        found.append(cached)
    assert found[0].ids.equal(found[1].ids) and found[0].weights.equal(found[1].weights)
    assert not found[1].ids.equal(found[2].ids)


def test_the_report_of_draws_agrees_with_its_noise(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    manifest = written(tmp_path, teacher, rows, "draws:n=12").manifest
    got = manifest.reconstruction
    assert got is not None
    exact = dense_logprobs(rows)
    entropy = -(exact.exp() * exact).sum(-1)
    variance = (exact.exp() * exact.square()).sum(-1) - entropy.square()
    assert got["entropy_nats"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    noise = (variance.mean() / 12).sqrt().item()
    assert abs(got["entropy_drawn_nats"] - got["entropy_nats"]) < SIGMAS * noise / PLACES**0.5
    # What was measured over 88 places is the standard deviation that the distributions imply, 12
    # draws each, within the spread of such a measurement.
    assert got["rms_error_nats"] == pytest.approx(noise, rel=0.5)
    assert got["smoothed_kl_nats"] > 0


# Bytes


@pytest.mark.parametrize(
    ("form", "vocabulary", "expected"),
    [
        ("topk:k=64", 49_152, 64 * (2 + 2) + 2),  # 256 bytes and the rest
        ("topk:k=64", 65_536, 258),
        ("topk:k=64", 65_537, 64 * (4 + 2) + 2),
        ("topk:k=64,store=float32", 49_152, 64 * (2 + 4) + 4),
        ("draws:n=12", 49_152, 12 * (2 + 1)),
        ("draws:n=12", 151_936, 12 * (4 + 1)),
        ("draws:n=12,power=0.8", 49_152, 12 * (2 + 4)),
    ],
)
def test_bytes_of_a_place(form: str, vocabulary: int, expected: int) -> None:
    chosen = parse(form)
    assert chosen.bytes_per_place(vocabulary) == expected
    # And that is what packing gives, at every width.
    logprobs = torch.randn(2, vocabulary).log_softmax(-1)
    stored = chosen.pack(logprobs, torch.rand(2, chosen.uniforms(), dtype=torch.float64))
    assert sum(tensor.nbytes for tensor in stored.values()) == 2 * expected


def test_wide_ids_come_back() -> None:
    """The last token of a vocabulary beyond 16 bits."""
    logprobs = torch.full((1, 70_000), -20.0)
    logprobs[0, -1] = 0.0
    for form in (TopKFormat(k=2), DrawsFormat(n=3)):
        found = form.unpack(form.pack(logprobs.log_softmax(-1), torch.full((1, 3), 0.5).double()))
        assert found.ids[0, 0] == 69_999


def test_bytes_on_the_disk_are_measured(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    got = written(tmp_path, teacher, rows, "topk:k=5")
    manifest = got.manifest
    files = shard.listed(tmp_path)
    assert len(files) == manifest.shards() == 4
    size = sum(file.stat().st_size for file in files)
    assert manifest.shard_bytes == size and manifest.bytes_per_token == size / PLACES
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert size - headers == PLACES * parse("topk:k=5").bytes_per_place(VOCABULARY)
    assert got.tokens_read == manifest.teacher_tokens == PLACES


def test_the_report_tells_all_of_it(tmp_path: Path, teacher: Online, rows: torch.Tensor) -> None:
    manifest = written(tmp_path, teacher, rows, "topk:k=5").manifest
    facts = report.facts(manifest)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["bytes_per_token"] == manifest.bytes_per_token
    assert facts["dense_bytes_per_token"] == 2 * VOCABULARY
    assert facts["reconstruction"] == manifest.reconstruction
    assert "biases" in str(facts["about"])
    line = report.line(manifest)
    assert f"{manifest.bytes_per_token:.1f} bytes a token" in line and "kl nats" in line
    assert "unfinished" in report.line(manifest.model_copy(update={"bytes_per_token": None}))


# Stopped and gone on


class _Killed(Exception):
    pass


def _content(folder: Path) -> list[dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    # Copies: what safetensors returns is mapped, and would change with a file that is harmed.
    return [
        {name: tensor.clone() for name, tensor in load_file(path).items()}
        for path in shard.listed(folder)
    ]


def _same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
        for one, two in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("form", ["topk:k=5", "draws:n=4"])
def test_a_killed_writer_goes_on_where_it_was(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, form: str
) -> None:
    def killed(label: str, done: int, total: int) -> None:
        if done >= 8:  # in the middle of the third shard
            raise _Killed

    with pytest.raises(_Killed):
        written(tmp_path / "cut", teacher, rows, form, progress=killed)
    kept = {path: path.stat().st_mtime_ns for path in shard.listed(tmp_path / "cut")}
    assert len(kept) == 2
    with pytest.raises(ModelError, match="unfinished, 2 of 4 shards"):
        read.open(tmp_path / "cut", wanted=belongs(rows))
    again = written(tmp_path / "cut", teacher, rows, form)
    assert again.kept == 2 and again.tokens_read == 5 * (LENGTH - 1)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    whole = written(tmp_path / "whole", teacher, rows, form)
    assert whole.kept == 0
    assert _same(_content(tmp_path / "cut"), _content(tmp_path / "whole"))
    assert again.manifest.reconstruction == whole.manifest.reconstruction
    # All there: nothing is read again.
    third = written(tmp_path / "cut", teacher, rows, form)
    assert (third.kept, third.tokens_read) == (4, 0)


def test_a_full_disk_leaves_the_shards_before_it(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    flushes = []
    real = os.fsync

    def full(descriptor: int) -> None:
        flushes.append(descriptor)
        if len(flushes) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(shard.os, "fsync", full)
    # The description of the cache is flushed first, by another module's name for the same function.
    with pytest.raises(RunError, match=r"No space left.*kept.*run the same command again"):
        written(tmp_path, teacher, rows, "topk:k=5")
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock"))
    assert left == ["rows-00000.safetensors", "teacher-cache.json"]
    monkeypatch.undo()
    assert written(tmp_path, teacher, rows, "topk:k=5").kept == 1
    read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, *range(ROWS)))


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "swap", "text"])
def test_damage_is_refused_and_repaired(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, harm: str
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5")
    sound = _content(tmp_path)
    path, other = shard.path_of(tmp_path, 1), shard.path_of(tmp_path, 2)
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-1])
    elif harm == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif harm == "gone":
        path.unlink()
    elif harm == "swap":
        path.write_bytes(other.read_bytes())
    else:
        path.write_text("not a shard")
    with pytest.raises(ModelError, match=r"rows-00001\.safetensors.*Delete this file"):
        read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, 3))
    assert written(tmp_path, teacher, rows, "topk:k=5").kept == 3
    assert _same(_content(tmp_path), sound)
    read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, 3))


def test_rows_of_sound_shards_can_be_read_past_a_flipped_byte(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    """Content is compared when a shard is first used, and only then."""
    written(tmp_path, teacher, rows, "topk:k=5")
    content = bytearray(shard.path_of(tmp_path, 1).read_bytes())
    content[-1] ^= 1
    shard.path_of(tmp_path, 1).write_bytes(content)
    cache = read.open(tmp_path, wanted=belongs(rows))
    cache.targets(batch(rows, 0, 2, 6))
    with pytest.raises(ModelError, match="not what was written"):
        cache.targets(batch(rows, 0, 3))


def test_few_files_are_held_open(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "OPEN_SHARDS", 2)
    written(tmp_path, teacher, rows, "topk:k=5")
    cache = read.open(tmp_path, wanted=belongs(rows))
    everything = cache.targets(batch(rows, *range(ROWS)))
    assert len(cache._files) == 2
    assert cache.targets(batch(rows, 0)).ids.equal(everything.ids[: LENGTH - 1])


# Refusals


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"revision": "r2"}, "another teacher: it holds org/teacher at r1"),
        ({"tokenizer": "u" * 64}, "another tokenizer"),
        ({"data": "0" * 64}, "another training text"),
        ({"length": 16}, "another row length: it holds rows of 9 tokens"),
        ({"rows": 12}, "another number of rows"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, changes: dict[str, Any], culprit: str
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5")
    with pytest.raises(SpecError, match=culprit):
        read.open(tmp_path, wanted=belongs(rows, **changes))
    # The same revision by another name is the same teacher.
    read.open(tmp_path, wanted=belongs(rows, teacher="/another/path"))


@pytest.mark.parametrize(
    ("form", "options", "culprit"),
    [
        ("topk:k=6", {}, "another format: topk:k=5,store=bfloat16, not topk:k=6"),
        ("topk:k=5", {"seed": 1}, "another seed"),
    ],
)
def test_a_writer_does_not_mix_caches(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    form: str,
    options: dict[str, Any],
    culprit: str,
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5")
    with pytest.raises(SpecError, match=culprit):
        written(tmp_path, teacher, rows, form, **options)
    changed = rows.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCABULARY
    with pytest.raises(SpecError, match="another training text"):
        written(tmp_path, teacher, changed, "topk:k=5")
    narrow = Online(random_model("llama", dtype=torch.bfloat16))
    with pytest.raises(SpecError, match="another computation type of the teacher"):
        written(tmp_path, narrow, rows, "topk:k=5")


def test_a_cache_refuses_what_it_cannot_answer(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5")
    with pytest.raises(SpecError, match="no hidden states"):
        read.open(tmp_path, wanted=belongs(rows), states=(1,))
    cache = read.open(tmp_path, wanted=belongs(rows))
    own = Batch(rows[:1], torch.ones(1, LENGTH), torch.tensor([-1]))
    with pytest.raises(SpecError, match="on-policy"):
        cache.targets(own)
    with pytest.raises(SpecError, match="there is no row 11"):
        cache.targets(Batch(rows[:1], torch.ones(1, LENGTH), torch.tensor([ROWS])))
    with pytest.raises(SpecError, match="rows of 9 tokens, the batch has 8"):
        cache.targets(Batch(rows[:1, :-1], torch.ones(1, LENGTH - 1), torch.tensor([0])))


def test_a_folder_without_a_cache_is_refused(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    with pytest.raises(ModelError, match="no teacher cache"):
        read.open(tmp_path, wanted=belongs(rows))
    written(tmp_path / "whole", teacher, rows, "topk:k=5")
    described = tmp_path / "whole" / source.FILE
    document = json.loads(described.read_text())
    for text, culprit in (
        ("{", "not the description"),
        ("[]", "no JSON object"),
        (json.dumps({**document, "version": 99}), "newer compresskit"),
        (json.dumps({**document, "format": "top:k=1"}), "not the description"),
    ):
        described.write_text(text)
        with pytest.raises(ModelError, match=culprit):
            read.open(tmp_path / "whole", wanted=belongs(rows))
    described.unlink()
    with pytest.raises(ModelError, match=r"shards but no teacher-cache\.json"):
        written(tmp_path / "whole", teacher, rows, "topk:k=5")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Name another folder"):
        written(tmp_path / "file", teacher, rows, "topk:k=5")


def test_an_edited_description_is_refused(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    """A revision that was edited by hand does not turn one teacher's words into another's."""
    written(tmp_path, teacher, rows, "topk:k=5")
    described = tmp_path / source.FILE
    described.write_text(described.read_text().replace('"r1"', '"r2"'))
    with pytest.raises(ModelError, match="a shard of another cache"):
        read.open(tmp_path, wanted=belongs(rows, revision="r2"))


def test_two_writers_do_not_meet(tmp_path: Path, teacher: Online, rows: torch.Tensor) -> None:
    from filelock import FileLock

    tmp_path.joinpath("cache").mkdir()
    with (
        FileLock(tmp_path / "cache" / ".lock"),
        pytest.raises(RunError, match="another process is writing"),
    ):
        written(tmp_path / "cache", teacher, rows, "topk:k=5")


def test_rows_and_formats_that_cannot_be_kept(
    tmp_path: Path, teacher: Online, rows: torch.Tensor
) -> None:
    with pytest.raises(SpecError, match="at least two tokens"):
        write(tmp_path, teacher, rows[:, :1], form=parse("topk"), belongs=belongs(rows[:, :1]))
    with pytest.raises(SpecError, match="other rows than those"):
        write(tmp_path, teacher, rows, form=parse("topk"), belongs=belongs(rows, data="0" * 64))
    with pytest.raises(SpecError, match=r"has 512 tokens\. Set k=512 or less"):
        written(tmp_path, teacher, rows, "topk:k=513")
    with pytest.raises(UnknownName, match="topk"):
        parse("topc:k=3")
    with pytest.raises(SpecError, match="less than or equal to 255"):
        parse("draws:n=256")
    broken = Online(random_model("llama", seed=5))
    next(iter(broken.model.parameters())).data.fill_(torch.nan)
    with pytest.raises(RunError, match="not numbers"):
        written(tmp_path / "nan", broken, rows, "topk:k=5")
