"""Regressions planted in the product: the gate must name the right tier, and pass without them.

The runs of a session are made in this process, one after the other, so that a fault planted by
`monkeypatch` is in them; everything else is `compresskit check` as a user runs it. The clock
only advances when a step is taken, or sleeps: who else is at work does not matter.
"""

from __future__ import annotations

import json
import uuid
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from compresskit import runner, sweep
from compresskit.cli.check import check
from compresskit.engines import native
from compresskit.errors import Exit
from compresskit.measure import clock, passes
from compresskit.methods.kv import sink_window
from compresskit.methods.quant import int8
from compresskit.methods.speculative import _base, _verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SUITE = """
name = "planted"
model = "tiny"
device = "cpu"

[workload]
prompt_tokens = 64
new_tokens = 16

[protocol]
passes = ["latency", "throughput", "memory", "quality"]

[quality]
prefill = 96
continuation = 16
windows = 8
greedy_prompts = 2
greedy_tokens = 16

[[variant]]
stack = ["quant/int8"]

[[variant]]
stack = [{ name = "kv/sink_window", sink = 4, window = 32 }]

[[variant]]
stack = ["speculative/ngram"]
"""

app = typer.Typer()
app.command()(check)


def in_this_process(arms: Any, notify: Any, *, seed: int) -> Iterator[tuple[int, Any]]:
    """Stands for `pairing.session`."""
    pair = uuid.uuid4().hex
    for index, arm in enumerate(arms):
        yield index, runner.run(arm.spec, pair=pair, speed_only=arm.speed_only)


class Gate:
    """The suite, its baseline, and the command."""

    def __init__(self, folder: Path) -> None:
        self.suite, self.baseline = folder / "planted.toml", folder / "baseline"
        self.suite.write_text(SUITE)

    def run(self, *words: str) -> Any:
        return CliRunner().invoke(
            app, [str(self.suite), "--against", str(self.baseline), "--json", *words]
        )

    def failures(self, result: Any) -> dict[str, set[tuple[str, str]]]:
        """Tier -> (record, metric) of everything that failed."""
        found: dict[str, set[tuple[str, str]]] = {}
        for row in json.loads(result.stdout)["rows"]:
            for outcome in row["outcomes"]:
                if outcome["verdict"] in ("worse", "changed"):
                    entry = (row["label"].split(":")[0], outcome["metric"])
                    found.setdefault(outcome["tier"], set()).add(entry)
        return found


class Clock:
    """Advances by what is slept on it, and by nothing else."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def lasting(seconds: float, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `eager_step` with steps that take `seconds` longer."""

    def prepared(model: Any) -> Any:
        step = make(model)

        def timed(*words: Any, **options: Any) -> Any:
            CLOCK.sleep(seconds)
            return step(*words, **options)

        return timed

    return prepared


def plant_sessions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sweep.pairing, "session", in_this_process)
    patch.setattr(passes.clock, "trace", partial(clock.trace, clock=CLOCK))
    patch.setattr(passes.clock, "span", partial(clock.span, clock=CLOCK))
    patch.setattr(native, "eager_step", lasting(0.002, native.eager_step))
    patch.setattr(runner, "Yardstick", lambda device: SimpleNamespace(read=lambda: 0.001))
    patch.setattr(clock.contention, "queued", lambda: 0.0)


@pytest.fixture(autouse=True)
def sessions_here(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_sessions(monkeypatch)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    gate = Gate(tmp_path_factory.mktemp("gate"))
    with pytest.MonkeyPatch.context() as patch:
        plant_sessions(patch)
        made = gate.run("--update")
    assert made.exit_code == Exit.DONE, made.stderr
    return gate


def test_unchanged_code_passes(gate: Gate) -> None:
    result = gate.run()
    assert result.exit_code == Exit.DONE, (gate.failures(result), result.stderr)
    assert gate.failures(result) == {}


def test_a_sleep_in_the_decode_step_is_a_matter_of_clocks(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "eager_step", lasting(0.001, native.eager_step))
    result = gate.run()
    assert result.exit_code == Exit.FAILED, result.stderr
    failures = gate.failures(result)
    assert set(failures) == {"clocks"}
    slower = {label for label, metric in failures["clocks"] if metric == "tpot_s"}
    assert {"dense", "quant/int8", "kv/sink_window"} <= slower
    assert "measuring them again" in result.stderr


def test_a_quantiser_that_rounds_wrongly_is_a_matter_of_quality(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = int8.quantise

    def floored(weight: torch.Tensor) -> int8.Int8Weight:
        stored = right(weight)
        step = stored.scales.float().where(stored.scales > 0, 1.0).unsqueeze(1)
        # Towards minus infinity, to multiples of eight: three bits lost.
        codes = (torch.floor(weight / step / 8) * 8).clamp(-127, 127)
        return stored._replace(codes=codes.to(torch.int8))

    monkeypatch.setattr(int8, "quantise", floored)
    result = gate.run()
    assert result.exit_code == Exit.FAILED, result.stderr
    failures = gate.failures(result)
    assert ("quant/int8", "kl_mean_nats") in failures["quality"]
    assert {label for found in failures.values() for label, _ in found} == {"quant/int8"}
    # As many bytes as before: the sizes do not give it away.
    assert ("quant/int8", "weights_bytes") not in failures.get("exact", set())


def test_a_cache_that_keeps_one_token_too_many_is_a_matter_of_bytes(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sink_window.keep
    monkeypatch.setattr(
        sink_window, "keep", lambda rows, *, sink, window: right(rows, sink=sink, window=window + 1)
    )
    result = gate.run()
    assert result.exit_code == Exit.FAILED, result.stderr
    failures = gate.failures(result)
    assert ("kv/sink_window", "cache_bytes") in failures["exact"]
    assert {label for found in failures.values() for label, _ in found} == {"kv/sink_window"}


def test_a_draft_that_accepts_a_wrong_token_is_a_matter_of_outputs(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _verify.verify

    def credulous(logits: Any, drafts: Any, *rest: Any) -> Any:
        found = right(logits, drafts, *rest)
        return [
            verdict if verdict.accepted == len(draft.tokens) else one_more(row, draft, verdict)
            for row, draft, verdict in zip(logits, drafts, found, strict=True)
        ]

    def one_more(logits: Any, draft: Any, verdict: Any) -> Any:
        more = verdict.accepted + 1
        after = int(logits[more].argmax(-1))
        return _verify.Verdict([*draft.tokens[:more], after], list(range(more)))

    monkeypatch.setattr(_base, "verify", credulous)
    result = gate.run()
    assert result.exit_code == Exit.FAILED, result.stderr
    failures = gate.failures(result)
    assert ("speculative/ngram", "outputs") in failures["exact"]
    assert {label for found in failures.values() for label, _ in found} == {"speculative/ngram"}


def test_a_run_that_is_gone_fails_and_a_failed_run_too(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*words: Any, **options: Any) -> Any:
        raise MemoryError("planted")

    monkeypatch.setattr(sink_window.SinkWindow, "apply", broken)
    result = gate.run()
    assert result.exit_code != Exit.DONE
    assert "kv/sink_window" in result.stdout
