"""Meters against things whose truth is known: fake clocks, replayed counters, counted tensors."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from compresskit import artefact as artefacts
from compresskit.device import resolve
from compresskit.measure import clock, energy, machine
from compresskit.measure.count import counting
from compresskit.measure.counters import Null, find
from compresskit.measure.counters.rapl import open_rapl
from compresskit.measure.memory import PeakMeter, weight_bytes
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
            yield Chunk(torch.zeros(1, count, dtype=torch.long), torch.tensor([count]), count, 1)


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


@dataclass
class Replayed:
    """A counter that gives readings from a list."""

    readings: list[float | None]
    source: str = "replay"
    scope: str = "package"

    def joules(self) -> float | None:
        return self.readings.pop(0)

    def reason(self) -> str:
        return "the replay ended"


def metered(readings: list[float | None], *, seconds: float = 1.0):
    now = [0.0]
    runs = [0]

    def work() -> int:
        now[0] += 0.3
        runs[0] += 1
        return 8

    window = energy.meter(
        work, Replayed(readings), seconds=seconds, synchronize=lambda: None, clock=lambda: now[0]
    )
    return window, runs[0]


def test_energy_is_the_difference_over_a_window_that_is_long_enough() -> None:
    window, runs = metered([100.0, 112.0])
    assert window.reading.kind == "measured"
    assert window.reading.value == pytest.approx(12.0)
    assert runs == 4
    assert window.tokens == 32
    assert window.window_seconds == pytest.approx(1.2)
    assert window.reads == ((0.0, 100.0), (pytest.approx(1.2), 112.0))
    assert window.scope == "package"


@pytest.mark.parametrize(
    ("readings", "reason", "runs"),
    [
        ([None], "the replay ended", 0),
        ([100.0, None], "the replay ended", 4),
        ([100.0, 100.0], "did not tick", 4),
        ([100.0, 40.0], "backwards", 4),
    ],
)
def test_a_counter_that_fails_is_unavailable_and_never_zero(readings, reason, runs) -> None:
    window, done = metered(readings)
    assert window.reading.kind == "unavailable"
    assert window.reading.value is None
    assert reason in window.reading.reason
    assert done == runs


def powercap(root: Path, *packages: str, name: str = "package-{}") -> None:
    for index, microjoules in enumerate(packages):
        folder = root / f"intel-rapl:{index}"
        folder.mkdir()
        (folder / "name").write_text(name.format(index) + "\n")
        (folder / "energy_uj").write_text(microjoules)
        (folder / "max_energy_range_uj").write_text("1000000")


def test_rapl_sums_packages_and_unwraps(tmp_path: Path) -> None:
    powercap(tmp_path, "900000", "100")
    counter = open_rapl(tmp_path)
    assert not isinstance(counter, str)
    before = counter.joules()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("400000")  # wrapped once
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("200100")
    after = counter.joules()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(0.5 + 0.2)


def test_rapl_leaves_out_parts_and_wholes_of_packages(tmp_path: Path) -> None:
    powercap(tmp_path, "1", name="psys")
    assert isinstance(open_rapl(tmp_path), str)


def test_rapl_that_vanishes_has_no_reading(tmp_path: Path) -> None:
    powercap(tmp_path, "1")
    counter = open_rapl(tmp_path)
    assert not isinstance(counter, str)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert counter.joules() is None
    assert "stopped answering" in counter.reason()


def test_a_machine_without_powercap_says_so(tmp_path: Path) -> None:
    assert "powercap" in str(open_rapl(tmp_path / "nothing"))
    null = Null("no counter here")
    assert null.joules() is None
    assert null.reason() == "no counter here"
    assert find(resolve("cpu")).source in {"none", "rapl"}


def test_shared_storage_is_counted_once() -> None:
    first = torch.nn.Linear(8, 4, bias=False)
    second = torch.nn.Linear(8, 4, bias=False)
    apart = torch.nn.Sequential(first, second)
    assert weight_bytes(apart) == {"dense": 2 * 4 * 8 * 4}
    second.weight = first.weight
    assert weight_bytes(apart) == {"dense": 4 * 8 * 4}


def test_a_packed_module_answers_for_itself() -> None:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.zeros(1000))

        def held_bytes(self) -> dict[str, int]:
            return {"packed": 7, "scales": 2}

    assert weight_bytes(torch.nn.Sequential(Packed(), torch.nn.Linear(2, 1))) == {
        "packed": 7,
        "scales": 2,
        "dense": 12,
    }


def test_peaks_are_reset_between_windows() -> None:
    meter = PeakMeter(resolve("cpu"))
    if not meter.resettable:
        pytest.skip("the high-water mark cannot be reset here")
    meter.start()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = meter.read()["rss"].value
    del block
    meter.start()
    low = meter.read()["rss"].value
    assert high - low > 48 << 20


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
            "calibration": len(ctx.calibration(32)),
            "dtype": ctx.dtype,
        }
        return replace(system, facts=facts)


def test_a_method_can_load_another_model_and_calibrate() -> None:
    plan = artefacts.plan(RunSpec(device="cpu"))
    with artefacts.opened(replace(plan, methods=(Placed("x/y", LoadsADraft()),))) as opened:
        assert opened.system.facts == {"draft_layers": 2, "calibration": 32, "dtype": "float32"}
