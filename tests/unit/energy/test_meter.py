"""One window over replayed counters: what is a reading, and what must never be one."""

from __future__ import annotations

import pytest

from compresskit.measure.energy import metering
from compresskit.measure.energy.counters import Null
from compresskit.record import Measured


def meter(world, counter, *, seconds=10.0, tick=0.1, work=None):
    return metering.meter(
        work or world.work(),
        counter,
        seconds=seconds,
        synchronize=lambda: None,
        tick=tick,
        clock=world.clock,
        sampled=world.sampled,
    )


def test_energy_is_the_difference_over_a_window_that_is_long_enough(world):
    window = meter(world, world.replay(lambda now: 100.0 + 50.0 * now))
    # 34 goes of 0.3 s are the first to reach 10 s.
    assert window.window_seconds == pytest.approx(10.2)
    assert isinstance(window.reading, Measured)
    assert window.reading.value == pytest.approx(510.0)
    assert (window.reading.unit, window.reading.source) == ("J", "replay_counter")
    assert window.tokens == 34 * 8
    assert window.reads == ((0.0, 100.0), (pytest.approx(10.2), pytest.approx(610.0)))
    assert (window.scope, window.devices) == ("gpu", ("device0",))


@pytest.mark.parametrize("tick", [0.1, 0.5])
def test_a_coarse_counter_is_off_by_at_most_a_tick_and_says_so(world, tick_course, tick):
    window = meter(world, world.replay(tick_course(200.0, tick)), tick=tick)
    truth = 200.0 * window.window_seconds
    assert window.quantisation == pytest.approx(tick / 10.2)
    assert abs(window.reading.value / truth - 1) <= window.quantisation
    assert window.ticks == int(10.2 / tick)


def test_an_unknown_tick_leaves_the_error_unknown(world):
    window = meter(world, world.replay(lambda now: 100.0 + now), tick=None)
    assert (window.tick_seconds, window.ticks, window.quantisation) == (None, None, None)


def until(moment, course):
    return lambda now: course(now) if now < moment else None


@pytest.mark.parametrize(
    ("course", "reason"),
    [
        (lambda now: 100.0, "did not tick"),
        (lambda now: 100.0 + 50 * now if now < 5 else 50 * (now - 5) / 100, "backwards"),
        (until(5.0, lambda now: 100.0 + 50 * now), "the replay ended"),
    ],
    ids=["never moves", "resets", "stops answering"],
)
def test_a_counter_that_fails_is_unavailable_and_never_zero(world, course, reason):
    window = meter(world, world.replay(course))
    assert window.reading.kind == "unavailable"
    assert window.reading.value is None
    assert reason in window.reading.reason
    assert window.tokens == 34 * 8


def test_without_a_counter_nothing_is_run(world):
    window = meter(world, Null("no counter here"), work=lambda: pytest.fail("was run"))
    assert window.reading.reason == "no counter here"
    assert world.now == 0.0


def test_two_gpus_are_added_up(world):
    counter = world.replay(lambda now: 100.0 + 50.0 * now, lambda now: 9e6 + 30.0 * now)
    window = meter(world, counter)
    assert window.reading.value == pytest.approx(80.0 * 10.2)
    assert window.devices == ("device0", "device1")


@pytest.mark.parametrize(
    ("second", "reason"),
    [(lambda now: 7.0, "did not tick"), (lambda now: 9.0 - 0.1 * now, "backwards")],
)
def test_one_of_two_gpus_that_fails_spoils_the_sum(world, second, reason):
    """The sum still rises: only a look at each device tells."""
    window = meter(world, world.replay(lambda now: 100.0 + 500.0 * now, second))
    assert reason in window.reading.reason


def test_the_power_beside_the_counter_is_integrated(world):
    counter = world.replay(lambda now: 100.0 + 50.0 * now, watts=lambda now: 49.0)
    window = meter(world, counter)
    assert window.reading.value == pytest.approx(510.0)
    assert window.integrated.value == pytest.approx(49.0 * 10.2)
    assert window.integrated.source == "replay_power_integral"


@pytest.mark.parametrize(("watts", "kind"), [(6.0, "measured"), (4.0, "unavailable")])
def test_a_counter_tenfold_off_its_power_is_refused(world, watts, kind):
    counter = world.replay(lambda now: 100.0 + 50.0 * now, watts=lambda now: watts)
    window = meter(world, counter)
    assert window.reading.kind == kind
    assert window.integrated.kind == "measured"
    if kind == "unavailable":
        assert "one of them is broken" in window.reading.reason


def test_a_power_sensor_that_throws_in_the_middle_leaves_the_counter_alone(world):
    sensor = {"watts": lambda now: None if 4 < now < 6 else 50.0}
    window = meter(world, world.replay(lambda now: 100.0 + 50.0 * now, **sensor))
    assert window.reading.value == pytest.approx(510.0)
    assert "stopped answering" in window.integrated.reason


def powered(world, watts):
    counter = world.replay(watts=watts)
    counter.cumulates, counter.source = False, "replay_power_integral"
    counter.devices = ("device0",)
    return counter


def test_where_there_is_only_power_its_integral_is_the_reading(world):
    # A ramp from 0 W to 102 W: the trapezoidal rule is exact.
    window = meter(world, powered(world, lambda now: 10.0 * now), tick=None)
    assert window.reading.value == pytest.approx(10.0 * 10.2**2 / 2)
    assert window.reading.source == "replay_power_integral"
    assert (window.integrated, window.reads) == (None, ())


def test_power_that_stops_being_told_is_no_reading(world):
    window = meter(world, powered(world, until(5.0, lambda now: 50.0)), tick=None)
    assert "stopped answering" in window.reading.reason


def test_a_jump_that_no_device_can_draw_is_a_reset(world):
    """A wrapping counter that is reset looks as if it had wrapped."""
    counter = world.replay(lambda now: 0.0 if now < 5 else 65_000.0)
    counter.highest_watts = 2000.0
    assert "more than the device can draw" in meter(world, counter).reading.reason
    counter.highest_watts = None
    world.now = 0.0
    assert meter(world, counter).reading.kind == "measured"


def test_memory_is_shown_apart_and_never_added(world):
    counter = world.replay(lambda now: 100.0 + 50.0 * now)
    counter.apart = lambda: {"dram": 3.0 + 2.0 * world.now}
    window = meter(world, counter)
    assert window.reading.value == pytest.approx(510.0)
    assert window.domains["dram"].value == pytest.approx(20.4)
    assert window.domains["dram"].source == "replay_counter_dram"


def test_a_block_that_has_to_run_anyway_is_metered_once(world):
    def metered(counter):
        once = {"synchronize": lambda: None, "clock": world.clock, "sampled": world.sampled}
        with metering.metered(counter, **once) as window:
            world.now += 2.0
        return window.stored()

    assert metered(world.replay(lambda now: 5.0 * now + 1)).reading.value == pytest.approx(10.0)
    assert metered(Null("none here")).reading.reason == "none here"
    assert world.now == 4.0


def test_an_error_in_the_work_is_not_swallowed(world):
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        meter(world, world.replay(lambda now: now + 1), work=broken)
