"""Meters against things whose truth is known: fake clocks, counted tensors."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from compresskit import artefact as artefacts, catalogue, runner
from compresskit.device import resolve
from compresskit.measure import clock, machine
from compresskit.measure.count import counting
from compresskit.method import AbstractMethod, Context, Placed, Stage
from compresskit.metrics import METRICS
from compresskit.record import Record
from compresskit.spec import ModelSpec, RunSpec
from compresskit.system import Chunk
from compresskit.traits import Effects


class AsyncDevice:
    """A device that finishes work only when it is waited for, with a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queued = 0.0

    def launch(self, seconds: float) -> None:
        """Queue work: the host goes on at once."""
        self.queued += seconds

    def synchronize(self) -> None:
        self.now += self.queued
        self.queued = 0.0

    def clock(self) -> float:
        return self.now

    def chunks(self, steps=((0.1, 1), (0.04, 3), (0.04, 1))):
        """Chunks of one row: seconds of work and tokens. Vector 1 of the timing definitions."""
        for seconds, count in steps:
            self.launch(seconds)
            yield Chunk(
                torch.zeros(1, count, dtype=torch.long), torch.tensor([count]), ((count, 1),)
            )


def test_the_trace_waits_for_the_device_at_each_chunk() -> None:
    device = AsyncDevice()
    sample = clock.trace(device.chunks, synchronize=device.synchronize, clock=device.clock)
    assert [a.seconds for a in sample.arrivals] == pytest.approx([0.10, 0.14, 0.18])
    assert [a.tokens for a in sample.arrivals] == [1, 3, 1]
    assert (sample.drafted, sample.accepted) == (5, 3)


def test_a_missing_synchronisation_would_be_seen() -> None:
    """Negative control: without waiting, everything seems to take no time."""
    device = AsyncDevice()
    sample = clock.trace(device.chunks, synchronize=lambda: None, clock=device.clock)
    assert [a.seconds for a in sample.arrivals] == [0.0, 0.0, 0.0]


def test_work_queued_before_the_request_is_not_charged_to_it() -> None:
    device = AsyncDevice()
    device.launch(5.0)
    sample = clock.trace(device.chunks, synchronize=device.synchronize, clock=device.clock)
    assert sample.arrivals[0].seconds == pytest.approx(0.1)


def test_the_span_waits_after_the_first_chunk_and_at_the_end() -> None:
    device = AsyncDevice()
    waits = []

    def wait() -> None:
        waits.append(device.queued)
        device.synchronize()

    sample = clock.span(device.chunks, synchronize=wait, clock=device.clock)
    assert waits == pytest.approx([0.0, 0.1, 0.08])
    assert [a.seconds for a in sample.arrivals] == pytest.approx([0.10, 0.18])
    assert [a.tokens for a in sample.arrivals] == [1, 4]


def test_a_request_of_one_chunk_has_one_mark() -> None:
    device = AsyncDevice()
    sample = clock.span(
        lambda: device.chunks(((0.1, 1),)), synchronize=device.synchronize, clock=device.clock
    )
    assert len(sample.arrivals) == 1


def ragged():
    """Two rows that take 6 tokens each, in different chunks; the second ends one chunk early."""
    for lengths, drafts in (
        ([1, 1], ((0, 0), (0, 0))),
        ([1, 4], ((3, 0), (3, 3))),
        ([3, 1], ((2, 2), (3, 0))),
        ([1, 0], ((0, 0), (0, 0))),
    ):
        yield Chunk(torch.zeros(2, max(lengths), dtype=torch.long), torch.tensor(lengths), drafts)


def test_rows_that_grow_apart_are_not_counted_twice() -> None:
    """The longest row has 1, 5, 6 and 6 tokens; the longest of each chunk would add up to 9."""
    sample = clock.trace(ragged, synchronize=lambda: None)
    assert [arrival.tokens for arrival in sample.arrivals] == [1, 4, 1, 0]
    ends = clock.span(ragged, synchronize=lambda: None)
    assert [arrival.tokens for arrival in ends.arrivals] == [1, 5]
    assert sum(int(chunk.lengths.max()) for chunk in ragged()) == 9


@pytest.mark.parametrize("probe", [clock.trace, clock.span])
def test_single_steps_are_kept_while_a_row_lasts(probe) -> None:
    sample = probe(ragged, synchronize=lambda: None)
    assert sample.per_step_drafted == ((0, 3, 2, 0), (0, 3, 3))
    assert sample.per_step_accepted == ((0, 0, 2, 0), (0, 3, 0))
    assert (sample.drafted, sample.accepted) == (11, 5)


def test_plain_decoding_keeps_no_steps_and_writes_none() -> None:
    def plain():
        yield Chunk(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]))

    sample = clock.trace(plain, synchronize=lambda: None)
    assert sample.per_step_drafted is sample.parts is None
    assert not {"per_step_drafted", "per_step_accepted", "parts"} & set(sample.model_dump())


def test_parts_wait_for_the_device_at_both_edges() -> None:
    device = AsyncDevice()
    parts = clock.Parts(synchronize=device.synchronize, clock=device.clock)
    device.launch(5.0)
    for seconds in (0.25, 0.5):
        with parts.during("verify"):
            device.launch(seconds)
        device.launch(1.0)
    with parts.during("draft"):
        pass
    assert parts.stored() == {"verify": (0.25, 0.5), "draft": (0.0,)}
    assert clock.Parts(synchronize=device.synchronize).stored() is None


def test_parts_without_waiting_would_show_nothing() -> None:
    """Negative control."""
    device = AsyncDevice()
    parts = clock.Parts(synchronize=lambda: None, clock=device.clock)
    with parts.during("verify"):
        device.launch(0.25)
    assert parts.stored() == {"verify": (0.0,)}


def test_a_run_that_speculates_keeps_its_steps_their_parts_and_the_cost_of_passes() -> None:
    spec = RunSpec().replace(
        model={"name": "tiny"},
        device="cpu",
        stack=[catalogue.parse_method("speculative/ngram:draft=3").model_dump()],
        workload={"prompt_tokens": 24, "new_tokens": 12},
        protocol={"passes": ["latency", "throughput", "memory"], "repeats": 1, "warmups": 0},
    )
    record = runner.run(spec)
    assert record.status == "ok", record.reason
    done = record.blocks[0].passes
    (sample,), (whole,) = done.latency.samples, done.throughput[0].samples
    drafted = sample.per_step_drafted
    assert sum(drafted[0]) == sample.drafted > 0
    assert len(drafted[0]) == len(sample.arrivals) == sample.forwards
    assert {part: len(spent) for part, spent in sample.parts.items()} == {
        "judge": len(sample.arrivals),
        "draft": len(sample.arrivals) - 1,
        "verify": len(sample.arrivals) - 1,
    }
    # Single chunks are not timed there, so neither are their parts.
    assert (whole.per_step_drafted, whole.parts) == (drafted, None)
    assert done.memory.drafter_bytes > 0
    assert record.setup.step_costs.widths == (1, 2, 3, 4)
    for name in ("speedup_predicted", "verify_s", "host_s", "drafter_bytes"):
        assert METRICS[name].value(record).value is not None
    assert Record.model_validate_json(record.model_dump_json()) == record


def test_costs_that_set_up_asked_for_are_kept_raw(open_stack) -> None:
    """An adaptive length knows what passes and drafting cost before anything is measured."""
    with open_stack("speculative/ngram:length=adaptive,draft=3") as opened:
        costs = opened.setup.step_costs
        assert costs.widths == (1, 2, 3, 4)
        assert len(costs.trial.parts["draft"]) == len(costs.trial.arrivals) - 1
        assert opened.setup.compile_seconds is None
        assert opened.setup.calibration_tokens == 0
    with open_stack("speculative/ngram:length=adaptive,costs=flat") as opened:
        assert opened.setup.step_costs is None


def test_the_garbage_collector_is_off_inside_and_as_before_after() -> None:
    seen = []

    def chunks():
        seen.append(gc.isenabled())
        yield Chunk(torch.zeros(1, 1), torch.tensor([1]))

    assert gc.isenabled()
    clock.trace(chunks, synchronize=lambda: None)
    assert (seen, gc.isenabled()) == ([False], True)

    def broken():
        raise RuntimeError
        yield

    with pytest.raises(RuntimeError):
        clock.trace(broken, synchronize=lambda: None)
    assert gc.isenabled()


def test_forward_passes_are_counted(open_stack) -> None:
    with open_stack() as opened:
        system, counter = counting(opened.system)
        ids = torch.tensor([[1, 2, 3]])
        cache = system.new_cache(8)
        with torch.inference_mode():
            plain = opened.system.step(ids, opened.system.new_cache(8))
            assert torch.equal(system.step(ids, cache), plain)
            system.step(ids[:, :1], cache)
        assert counter.calls == 2


def test_a_machine_has_one_name_and_no_host_name() -> None:
    import platform

    first, second = machine.describe(resolve("cpu")), machine.describe(resolve("cpu"))
    assert first == second
    host = platform.node()
    assert len(host) < 4 or host not in first.model_dump_json()


class LoadsADraft(AbstractMethod):
    """Asks the context for everything that it offers."""

    stage = Stage.DECODE

    def effects(self) -> Effects:
        return Effects()

    def apply(self, system, ctx: Context):
        draft = ctx.load(ModelSpec(name="tiny:draft"))
        facts = {
            "draft_layers": draft.model.config.num_hidden_layers,
            "calibration": len(ctx.calibration("calibration", 32)),
            "dtype": ctx.dtype,
        }
        return replace(system, facts=facts)


def test_a_method_can_load_another_model_and_calibrate() -> None:
    plan = artefacts.plan(RunSpec(device="cpu"))
    with artefacts.opened(replace(plan, methods=(Placed("x/y", LoadsADraft()),))) as opened:
        told = {"draft_layers": 2, "calibration": 32, "dtype": "float32"}
        assert told.items() <= opened.system.facts.items()
