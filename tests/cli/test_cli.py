"""The command line as a user or a script meets it: stdout, stderr, exit codes.

Commands run in a process of their own, as they do for users; the tiny model needs no network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compresskit import assets, metrics, store
from compresskit.record import Measured


def call(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compresskit", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def one_json(done: subprocess.CompletedProcess[str]) -> object:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


QUICK = (
    "--prompt-tokens",
    "16",
    "--new-tokens",
    "4",
    "--repeats",
    "1",
    "--pass",
    "latency",
    "--pass",
    "memory",
)


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "run",
        "table",
        "methods",
        "models",
        "explain",
        "generate",
        "evaluate",
        "doctor",
        "schema",
    ],
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = call(command, "--help")
    assert done.returncode == 0
    assert f"compresskit {command}" in done.stdout


def test_the_version_is_printed() -> None:
    assert call("--version").stdout.strip()


def test_run_writes_records_and_prints_one_json_document(tmp_path: Path) -> None:
    methods = ("--method", "quant/int8", "--method", "kv/sink_window:sink=4,window=8")
    done = call("run", *methods, *QUICK, "--out", str(tmp_path), "--json")
    document = one_json(done)
    assert document
    paths = [p for p in tmp_path.rglob("*.json") if p.name != "machine.json"]
    assert len(paths) == 2
    for record in map(store.load, paths):
        # Each row had a process of its own: hardly anything of its peak is left unexplained.
        share = metrics.METRICS["unattributed_share"].value(record)
        assert isinstance(share, Measured)
        assert abs(share.value) < 0.1
    assert len(list(tmp_path.rglob("machine.json"))) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a_second_run_keeps_the_records_of_the_first(tmp_path: Path) -> None:
    words = ("run", *QUICK, "--out", str(tmp_path))
    assert call(*words).returncode == 0
    path = next(p for p in tmp_path.rglob("*.json") if p.name != "machine.json")
    before = path.stat().st_mtime_ns
    again = call(*words)
    assert "kept the record" in again.stderr
    assert path.stat().st_mtime_ns == before
    assert call(*words, "--fresh").returncode == 0
    assert path.stat().st_mtime_ns > before


def test_a_broken_record_is_measured_again(tmp_path: Path) -> None:
    words = ("run", *QUICK, "--out", str(tmp_path))
    call(*words)
    path = next(p for p in tmp_path.rglob("*.json") if p.name != "machine.json")
    path.write_text(path.read_text()[:200])
    refused = call("table", str(tmp_path))
    assert refused.returncode == 2
    assert path.name in refused.stderr
    assert call(*words).returncode == 0
    json.loads(path.read_text())


def test_a_conflict_becomes_a_skipped_record_and_the_suite_goes_on(tmp_path: Path) -> None:
    suite = tmp_path / "clash.toml"
    suite.write_text(
        "[workload]\nprompt_tokens = 16\nnew_tokens = 4\n[protocol]\nrepeats = 1\npasses = ['latency']\n"
        "[[variant]]\nstack = ['kv/sink_window', 'speculative/ngram']\n[[variant]]\nstack = ['kv/int8']\n"
    )
    done = call("run", str(suite), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "speculative/ngram needs 'rollback', which kv/sink_window does not leave" in done.stderr
    states = [
        json.loads(p.read_text())["status"]
        for p in (tmp_path / "out").rglob("*.json")
        if p.name != "machine.json"
    ]
    assert sorted(states) == ["ok", "ok", "skipped"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--method", "quant/int88"), "Did you mean 'quant/int8'"),
        (("run", "--method", "quant/int4:grup=32"), "Did you mean 'group'"),
        (("run", "--method", "quant/int4:group=33"), "group"),
        (("run", "--model", "tniy"), "tiny"),
        (("run", "--model", "./no/such/folder"), "no/such/folder"),
        (("run", "nothing.toml"), "nothing.toml"),
        (("run", "--prompt-tokens", "999999"), "context"),
        (("run", "--text", "no-such-file.txt", *QUICK), "no-such-file.txt"),
        (("run", "--device", "cuda"), "CUDA"),
        (("generate", "--prompt", ""), "empty"),
        (("generate",), "--prompt"),
        (
            (
                "generate",
                "--prompt",
                "a",
                "--method",
                "kv/sink_window",
                "--method",
                "speculative/ngram",
            ),
            "which kv/sink_window does not leave",
        ),
        (("generate", "--prompt-file", "none.txt"), "none.txt"),
        (("generate", "--prompt", "a", "--max-new-tokens", "999999"), "context"),
        (("evaluate", "--text", "no-such-file.txt"), "no-such-file.txt"),
        (("table", "no/such/folder"), "no/such/folder"),
        (("explain", "--method", "kv/int8:bits=9"), "unknown key"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_generate_reports_tokens_steps_and_drafts() -> None:
    # Text of the kind the tiny model was trained on: it repeats itself, so drafts are accepted.
    prompt = assets.text_path("heldout").read_text(encoding="utf-8")[:1500]
    words = ("generate", "--prompt", prompt, "--max-new-tokens", "48", "--ignore-stop", "--json")
    plain = one_json(call(*words))
    drafted = one_json(call(*words, "--method", "speculative/ngram"))
    assert plain["tokens"] == drafted["tokens"]
    assert plain["drafted"] == 0
    assert drafted["drafted"] >= drafted["accepted"] > 0
    assert drafted["forwards"] < plain["forwards"] == 48
    assert plain["text"]


def test_sampling_is_seeded() -> None:
    words = (
        "generate",
        "--prompt",
        "Once",
        "--temperature",
        "1.0",
        "--max-new-tokens",
        "16",
        "--json",
        "--ignore-stop",
    )
    first, same, other = (
        one_json(call(*words, "--seed", seed))["tokens"] for seed in ("1", "1", "2")
    )
    assert first == same != other


def test_evaluate_prints_likelihood_and_fidelity() -> None:
    words = (
        "evaluate",
        "--method",
        "quant/int4:group=32",
        "--tokens",
        "512",
        "--window",
        "128",
        "--json",
    )
    quality = one_json(call(*words))["quality"]
    assert quality["fidelity"]["kl"]["mean"] > 0
    assert quality["likelihood"]["protocol_id"]


def test_explain_loads_no_weights_and_names_the_conflict() -> None:
    answer = one_json(
        call("explain", "--method", "speculative/ngram", "--method", "kv/sink_window", "--json")
    )
    assert [step["method"] for step in answer["steps"]] == ["kv/sink_window", "speculative/ngram"]
    assert "which kv/sink_window does not leave" in answer["conflict"]
    fits = one_json(call("explain", "--method", "quant/int8", "--json"))
    assert fits["conflict"] is None


@pytest.mark.parametrize("command", ["methods", "models", "doctor"])
def test_listings_are_one_json_document(command: str) -> None:
    assert one_json(call(command, "--json"))
    assert call(command).returncode == 0


def test_doctor_says_why_energy_is_missing_or_where_it_comes_from() -> None:
    energy = one_json(call("doctor", "--json"))["energy"]
    assert energy.get("reason") or energy.get("source")


@pytest.mark.parametrize("what", ["record", "spec"])
def test_schemas_are_json_schema(what: str) -> None:
    import jsonschema

    schema = one_json(call("schema", what))
    jsonschema.Draft202012Validator.check_schema(schema)


def test_ctrl_c_keeps_finished_records_and_says_how_to_go_on(tmp_path: Path) -> None:
    suite = tmp_path / "long.toml"
    suite.write_text(
        "baselines = false\n[workload]\nprompt_tokens = 16\n[protocol]\npasses = ['latency']\nrepeats = 50\n"
        "[[variant]]\nstack = ['kv/int8']\n[variant.sweep]\n'workload.new_tokens' = [4, 2000]\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "compresskit", "run", str(suite), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Whoever runs the tests in the background may have them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while (
        not [p for p in out.rglob("*.json") if p.name != "machine.json"]
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    kept = [p for p in out.rglob("*.json") if p.name != "machine.json"]
    assert len(kept) == 1
    assert all(json.loads(p.read_text())["status"] == "ok" for p in kept)
    assert not list(out.rglob("*.partial"))
