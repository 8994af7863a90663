"""The counter's tick, and power over time: measured against counters of known behaviour."""

from __future__ import annotations

import threading

import pytest

from compresskit.measure.energy import power, tick
from compresskit.measure.energy.counters import Null


def measured(world, *courses):
    return tick.tick_seconds(world.replay(*courses), clock=world.clock, pause=world.pause)


@pytest.mark.parametrize("period", [0.01, 0.1, 0.5])
def test_the_tick_is_found_whatever_the_board(world, tick_course, period):
    assert measured(world, tick_course(300.0, period)) == pytest.approx(period, abs=0.0015)
    assert world.now <= 3.01


def test_a_fast_counter_is_not_polled_for_longer_than_needed(world, tick_course):
    measured(world, tick_course(300.0, 0.01))
    assert world.now < 0.6


def test_of_two_gpus_the_slower_tick_counts(world, tick_course):
    """Their sum moves far more often than either."""
    found = measured(world, tick_course(300.0, 0.1), tick_course(300.0, 0.037))
    assert found == pytest.approx(0.1, abs=0.0015)


@pytest.mark.parametrize(
    "course",
    [lambda now: 5.0, lambda now: 5.0 + int(now), lambda now: 5.0 if now < 1 else None],
    ids=["never moves", "moves too seldom", "stops answering"],
)
def test_too_few_changes_leave_the_tick_unknown(world, course):
    assert measured(world, course) is None


def test_no_counter_has_no_tick(world):
    assert tick.tick_seconds(Null("none"), clock=world.clock, pause=world.pause) is None


def test_the_tick_is_measured_while_the_work_goes_on(world):
    done = []
    assert tick.while_busy(Null("none"), lambda: done.append(1)) is None
    # Real threads: how often the work got its turn is not ours to say.
    assert isinstance(done, list)


def traced(world, watts, *, seconds=2.0, step=0.1):
    trace = power.Trace(world.replay(watts=watts), clock=world.clock)
    for _ in range(round(seconds / step)):
        trace.look()
        world.now += step
    trace.look()
    return trace.integral("some_integral")


def test_a_ramp_is_integrated_exactly(world):
    found = traced(world, lambda now: 100.0 * now)
    assert found.value == pytest.approx(200.0)
    assert found.source == "some_integral"


@pytest.mark.parametrize(
    ("watts", "options", "reason"),
    [
        (lambda now: 50.0 if now < 1 else None, {}, "stopped answering"),
        (lambda now: 50.0, {"seconds": 30.0, "step": 1.5}, "more than a second"),
        (lambda now: 50.0, {"seconds": 0.5}, "6 times"),
        (lambda now: 0.0, {}, "no power"),
    ],
)
def test_a_trace_with_holes_has_no_integral(world, watts, options, reason):
    found = traced(world, watts, **options)
    assert found.kind == "unavailable"
    assert reason in found.reason


def test_a_counter_without_a_sensor_has_no_trace(world):
    assert traced(world, None) is None


def test_the_sampler_looks_in_the_background_and_stops_with_its_block(world):
    often, looks, before = threading.Event(), [], threading.active_count()

    def watts(now):
        looks.append(threading.get_ident())
        if len(looks) > 5:
            often.set()
        return 50.0

    with power.sampled(world.replay(watts=watts), period=0.001) as trace:
        assert often.wait(timeout=10)
    assert threading.active_count() == before
    assert len(trace.samples) == len(looks)
    # The edges are sampled by the caller, the rest by one other thread.
    assert looks[0] == looks[-1] == threading.get_ident()
    assert len(set(looks)) == 2


def test_where_there_is_nothing_to_sample_no_thread_is_started(world):
    before = threading.active_count()
    with power.sampled(world.replay(lambda now: now)) as trace:
        assert threading.active_count() == before
    assert trace.samples == []
