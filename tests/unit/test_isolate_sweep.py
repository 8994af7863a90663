"""A child that dies is a failed record, a full disk is one error, and nothing finished is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from compresskit import isolate, runner, store, sweep
from compresskit.errors import RunError, UsageError
from compresskit.record import Record
from compresskit.spec import ModelSpec, ProtocolSpec, QualitySpec, RunSpec, WorkloadSpec

SPEC = RunSpec(
    device="cpu",
    workload=WorkloadSpec(prompt_tokens=16, new_tokens=4),
    protocol=ProtocolSpec(
        repeats=1, passes=("latency", "throughput", "memory", "energy", "quality")
    ),
    quality=QualitySpec(prefill=32, continuation=4, windows=2, greedy_prompts=1, greedy_tokens=4),
)


class Quiet:
    """A watcher that only remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.ended: list[tuple[Record, bool]] = []

    def begin(self, index: int, total: int, label: str) -> None:
        pass

    def phase(self, phase: str, detail: str = "") -> None:
        self.phases.append(phase)

    def end(self, record: Record, *, reused: bool) -> None:
        self.ended.append((record, reused))


def child(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Replace the child process by one that runs `body`."""
    popen = isolate.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([command[0], "-c", body], **options)

    monkeypatch.setattr(isolate.subprocess, "Popen", start)


def test_a_run_in_a_child_gives_a_whole_record() -> None:
    watcher = Quiet()
    found = isolate.run(SPEC, watcher.phase)
    assert found.status == "ok", found.reason
    assert {"load", "apply", "latency", "throughput", "memory", "energy", "quality"} <= set(
        watcher.phases
    )
    assert found.digest == SPEC.digest()
    passes = found.blocks[0].passes
    assert passes.latency is not None
    assert len(passes.latency.samples) == 1
    assert len(passes.latency.warmups) == 1
    assert [arrival.tokens for arrival in passes.latency.samples[0].arrivals] == [1] * 4
    assert passes.latency.samples[0].forwards == 4
    assert passes.memory is not None
    # 4 layers, 2 key/value heads of 32, keys and values, float32, 16 + 4 - 1 tokens
    assert passes.memory.cache_bytes == {"keys_values": 4 * 2 * 32 * 2 * 4 * 19}
    assert passes.memory.tokens_in_cache == 19
    assert sum(passes.memory.weights_bytes.values()) >= 4 * passes.memory.parameters
    assert passes.energy is not None
    assert all(window.reading.value != 0 for window in passes.energy.generate)
    assert found.quality is not None
    assert found.quality.likelihood is not None
    assert json.loads(store.dumps(found))


def test_a_killed_child_is_a_failed_record(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    found = isolate.run(SPEC)
    assert found.status == "failed"
    assert "SIGKILL" in (found.reason or "")
    assert "memory" in (found.reason or "")


def test_a_crashed_child_leaves_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import sys; sys.exit('the sky fell')")
    found = isolate.run(SPEC)
    assert found.status == "failed"
    assert "the sky fell" in (found.reason or "")


def test_half_an_event_is_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, 'import sys; sys.stdin.readline(); print(\'{"record": {"dig\')')
    assert isolate.run(SPEC).status == "failed"


def test_a_wrong_request_found_in_the_child_is_a_usage_error() -> None:
    spec = SPEC.replace(workload={"text": "no-such-file.txt", "prompt_tokens": 16, "new_tokens": 4})
    with pytest.raises(UsageError, match="no-such-file"):
        isolate.run(spec)


def test_prints_of_a_library_do_not_garble_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "from compresskit import isolate, runner\n"
        "real = runner.run\n"
        "def noisy(*a, **k):\n    print('chatter'); return real(*a, **k)\n"
        "runner.run = noisy\nisolate.main()\n"
    )
    child(monkeypatch, body)
    assert isolate.run(SPEC).status == "ok"


def test_an_exception_in_a_run_is_a_failed_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(runner.passes.Bench, "timed", broken)
    found = runner.run(SPEC)
    assert found.status == "failed"
    assert "ZeroDivisionError: planted" in (found.reason or "")


def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(runner.passes.Bench, "timed", full)
    assert "smaller batch" in (runner.run(SPEC).reason or "")


def test_a_batch_that_does_not_fit_is_said_and_smaller_ones_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = runner.passes.Bench.timed

    def tight(self: Any, probe: Any, index: int, batch: int) -> Any:
        if batch > 2:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return timed(self, probe, index, batch)

    monkeypatch.setattr(runner.passes.Bench, "timed", tight)
    spec = SPEC.replace(
        workload={"prompt_tokens": 16, "new_tokens": 4, "batch_sizes": [1, 2, 4, 8]}
    )
    found = runner.run(spec)
    assert found.status == "ok", found.reason
    rows = found.blocks[0].passes.throughput or ()
    assert [bool(row.samples) for row in rows] == [True, True, False, False]
    assert all("does not fit" in (row.reason or "") for row in rows[2:])


def test_a_full_disk_is_one_error_and_finished_records_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = SPEC.replace(protocol={"repeats": 1, "passes": ["latency"]})
    other = fast.replace(seed=1)
    watcher = Quiet()
    fsync = os.fsync
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # machine.json, first record, then the disk is full
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        sweep.run([fast, other], suite="s", out=tmp_path, resume=True, watcher=watcher)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "machine.json"]
    assert [p.name for p in files] == [f"{fast.digest()}.json"]
    monkeypatch.setattr(store.os, "fsync", fsync)
    swept = sweep.run([fast, other], suite="s", out=tmp_path, resume=True, watcher=watcher)
    assert [r.status for r in swept.records] == ["ok", "ok"]
    assert [reused for _, reused in watcher.ended] == [False, True, False]


def test_records_of_other_code_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone brings published records along; they are not this machine's, nor this code's."""
    made = iter([runner.failed(SPEC, "first"), runner.failed(SPEC, "second")])
    here = sweep.environment.describe()

    def fake(arms: Any, notify: Any, *, seed: int) -> Any:
        yield 0, next(made).model_copy(update={"status": "ok", "environment": here})

    monkeypatch.setattr(sweep.pairing, "session", fake)
    watcher = Quiet()

    def go() -> bool:
        sweep.run([SPEC], suite="s", out=tmp_path, resume=True, watcher=watcher)
        return watcher.ended[-1][1]

    assert [go(), go()] == [False, True]
    newer = here.model_copy(update={"packages": {**here.packages, "torch": "99"}})
    monkeypatch.setattr(sweep.environment, "describe", lambda: newer)
    assert go() is False


def test_preflight_refuses_what_every_child_would_refuse() -> None:
    with pytest.raises(UsageError, match="context"):
        sweep.preflight([SPEC.replace(workload={"prompt_tokens": 100_000})], lambda *_: None)
    with pytest.raises(UsageError, match="tiny"):
        sweep.preflight([SPEC.replace(model=ModelSpec(name="tniy").model_dump())], lambda *_: None)
