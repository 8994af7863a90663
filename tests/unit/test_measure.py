"""Meters against things whose truth is known: fake clocks, counted tensors."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from compresskit import artefact as artefacts
from compresskit.device import resolve
from compresskit.measure import clock, machine
from compresskit.measure.count import counting
from compresskit.method import AbstractMethod, Context, Placed, Stage
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
