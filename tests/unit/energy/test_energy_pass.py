"""The pass: how many windows of which length, what comes before them, and what costs nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compresskit.device import resolve
from compresskit.measure.energy import estimate, metering
from compresskit.measure.energy.counters import Null
from compresskit.measure.energy.turns import Energy
from compresskit.spec import ProtocolSpec, WorkloadSpec
from compresskit.system import Chunk

PROMPT, NEW, BATCH = 32, 16, 2


def bench(world, **protocol):
    """A system whose prefill takes 0.2 s and whose every step takes 0.05 s."""

    def generate(request):
        for step in range(request.max_new_tokens):
            world.now += 0.05 if step else 0.2
            if world.trace is not None:
                world.trace.look()
            lengths = torch.ones(BATCH, dtype=torch.long)
            yield Chunk(torch.zeros(BATCH, 1, dtype=torch.long), lengths)

    return SimpleNamespace(
        system=SimpleNamespace(device=resolve("cpu"), model=None, generate=generate),
        protocol=ProtocolSpec(**protocol),
        workload=WorkloadSpec(prompt_tokens=PROMPT, new_tokens=NEW, batch_sizes=(BATCH,)),
        prompt_tokens=PROMPT,
        seed=7,
        request=lambda index, batch, new: SimpleNamespace(max_new_tokens=new),
    )


def energy_pass(world, counter, *, turns=8, tick=0.02, **protocol):
    def meter(*args, **options):
        return metering.meter(*args, **options, clock=world.clock, sampled=world.sampled)

    def model(*args, **options):
        busy = {"clock": world.clock, "processor": lambda: 0.5 * world.now}
        return estimate.meter(*args, **options, **busy)

    one = Energy(
        bench(world, **protocol),
        counter=counter,
        measure_tick=lambda counter, work: tick,
        pause=world.pause,
        meter=meter,
        model=model,
    )
    for index in range(turns):
        one.turn(index)
    return one.result()


def drawing(world, watts=50.0):
    return world.replay(lambda now: 100.0 + watts * now)


def test_every_turn_takes_one_window_of_each_kind(world):
    done = energy_pass(world, drawing(world), turns=3)
    assert (len(done.prefill), len(done.generate)) == (3, 3)
    assert (done.batch, done.prompt_tokens, done.new_tokens) == (BATCH, PROMPT, NEW)
    for window in (*done.prefill, *done.generate):
        assert window.reading.value == pytest.approx(50.0 * window.window_seconds)
        assert window.window_seconds >= 10.0


def test_prefill_counts_prompt_tokens_and_generation_delivered_ones(world):
    done = energy_pass(world, drawing(world), turns=1)
    # 0.2 s a prefill of two rows; 0.2 + 15 * 0.05 s an answer.
    assert done.prefill[0].tokens == pytest.approx(10.0 / 0.2 * BATCH * PROMPT, rel=0.02)
    assert done.generate[0].tokens == 11 * BATCH * NEW


def test_no_more_windows_than_the_protocol_asks_for(world):
    done = energy_pass(world, drawing(world), turns=8, energy_windows=5)
    assert (len(done.prefill), len(done.generate)) == (5, 5)


@pytest.mark.parametrize(
    ("tick", "asked", "length"), [(0.02, 10.0, 10.0), (0.5, 10.0, 50.0), (None, 10.0, 10.0)]
)
def test_a_window_lasts_as_asked_or_a_hundred_ticks(world, tick, asked, length):
    done = energy_pass(world, drawing(world), turns=1, tick=tick, energy_seconds=asked)
    (window,) = done.generate
    assert length <= window.window_seconds < length + 1.0
    assert window.tick_seconds == tick
    assert window.ticks is None if tick is None else window.ticks >= 100


def test_the_loaded_machine_is_metered_idle_once_before_all_windows(world):
    counter = world.replay(lambda now: 100.0 + 20.0 * now)
    done = energy_pass(world, counter, turns=2)
    assert done.idle.tokens == 0
    assert done.idle.reading.value / done.idle.window_seconds == pytest.approx(20.0)
    assert done.idle.reads[0][1] < done.prefill[0].reads[0][1]


def test_pauses_between_windows_are_random_and_repeatable(world):
    energy_pass(world, drawing(world), turns=4, tick=0.5)
    gaps = [pause for pause in world.pauses if pause not in (0.1, 1.0)]
    assert len(gaps) == 8
    assert len(set(gaps)) == 8
    assert all(0 <= gap <= 1.0 for gap in gaps)
    again = type(world)()
    energy_pass(again, drawing(again), turns=4, tick=0.5)
    assert world.pauses == again.pauses


def test_a_machine_without_a_counter_runs_nothing_and_waits_for_nothing(world):
    one = bench(world)
    one.system.generate = lambda request: pytest.fail("was run")
    meter = Energy(
        one,
        counter=Null("no counter here"),
        measure_tick=lambda counter, work: pytest.fail("was measured"),
        pause=lambda seconds: pytest.fail("was waited for"),
    )
    for index in range(8):
        meter.turn(index)
    done = meter.result()
    assert [one.reading.reason for one in (*done.prefill, *done.generate)] == [
        "no counter here"
    ] * 2
    assert done.idle is None


def test_after_a_lost_window_no_more_of_its_kind_is_taken(world):
    """Else the i-th window would not be the i-th turn's."""
    # Idle until 11 s, then ten seconds a window: the third of each kind falls into the gap.
    fails = world.replay(lambda now: None if 60 < now < 70 else 100.0 + now)
    done = energy_pass(world, fails, turns=8)
    for windows in (done.prefill, done.generate):
        kinds = [window.reading.kind for window in windows]
        assert kinds == ["measured", "measured", "unavailable"]


def test_an_estimate_is_made_only_where_it_was_asked_for(world):
    silent = energy_pass(world, Null("none"), turns=2)
    assert [window.reading.kind for window in silent.generate] == ["unavailable"]
    assert world.now == 0.0
    done = energy_pass(world, Null("none"), turns=2, estimate_energy=True, energy_seconds=2.0)
    assert [window.reading.kind for window in done.generate] == ["estimated"]
    assert all(2.0 <= window.window_seconds < 3.0 for window in done.generate)


def test_a_counter_is_never_replaced_by_an_estimate(world):
    done = energy_pass(world, drawing(world), turns=1, estimate_energy=True)
    assert done.generate[0].reading.kind == "measured"


def test_a_gpu_is_not_estimated(world):
    one = bench(world, estimate_energy=True)
    one.system.device = SimpleNamespace(kind="cuda", ordinals=(0,))
    meter = Energy(one, counter=Null("MIG is on"))
    meter.turn(0)
    assert "for the CPU only" in meter.result().generate[0].reading.reason
