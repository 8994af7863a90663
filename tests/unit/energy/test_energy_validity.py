"""Which energy windows a verdict speaks against, and which it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit import store
from compresskit.record import EnergyPass, EnergyWindow, Measured, Unavailable
from compresskit.units import Unit
from compresskit.validity import judge

GOLDEN = Path(__file__).parents[2] / "golden" / "records" / "v1"


def window(joules=3000.0, *, source="nvml_counter", **changes) -> EnergyWindow:
    """A sound window: 10 s, 100 ticks, a cross-check that agrees."""
    fields = {
        "reading": Measured(value=joules, unit=Unit.JOULE, source=source),
        "window_seconds": 10.0,
        "tokens": 160,
        "scope": "gpu",
        "devices": ("a",),
        "ticks": 100,
        "tick_seconds": 0.1,
        "integrated": Measured(value=3000.0, unit=Unit.JOULE, source="nvml_power_integral"),
    }
    return EnergyWindow(**{**fields, **changes})


def verdict(generate: list[EnergyWindow]):
    record = store.load(GOLDEN / "synthetic-dense.json")
    energy = EnergyPass(prefill=(window(),) * 8, generate=tuple(generate))
    block = record.blocks[0]
    passes = block.passes.model_copy(update={"energy": energy})
    block = block.model_copy(update={"passes": passes})
    return judge(record.model_copy(update={"blocks": (block,)}))


def test_sound_windows_are_valid():
    assert verdict([window()] * 8).reasons == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window_seconds": 9.0}, "window_too_short: generate windows of 9.0 s"),
        ({"ticks": 99}, "window_too_short: generate windows hold 99 ticks"),
        ({"ticks": None}, "window_too_short: generate windows have an unknown error"),
        ({"joules": 3400.0}, "energy_cross_check: the counter gives 1.13 times"),
        ({"joules": 2600.0}, "energy_cross_check: the counter gives 0.87 times"),
    ],
)
def test_a_window_with_a_fault_warns(changes, reason):
    found = verdict([window(**changes)] * 8)
    assert found.verdict == "WARN"
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith(reason)


def test_one_short_window_among_sound_ones_is_enough():
    found = verdict([*[window()] * 7, window(window_seconds=3.0)])
    assert len(found.reasons) == 1


def test_an_integral_has_no_ticks():
    found = verdict([window(source="nvml_power_integral", ticks=None, integrated=None)] * 8)
    assert found.reasons == ()


def test_a_cross_check_within_its_tolerance_is_no_reason():
    assert verdict([window(3200.0)] * 8).reasons == ()


@pytest.mark.parametrize(("count", "reasons"), [(4, 1), (5, 0)])
def test_few_windows_warn(count, reasons):
    found = verdict([window()] * count)
    assert len(found.reasons) == reasons
    assert all(one.startswith("too_few_windows") for one in found.reasons)


def test_a_counter_that_was_lost_on_the_way_is_said():
    lost = window().model_copy(update={"reading": Unavailable(reason="counter did not tick")})
    found = verdict([*[window()] * 6, lost])
    assert found.reasons == (
        "energy_lost: after 6 generate windows the counter was lost: counter did not tick",
    )
    # A machine without a counter has lost nothing.
    assert verdict([lost]).reasons == ()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"joules": 0.0}, "zero_energy"),
        ({"joules": -5.0}, "zero_energy"),
        ({"window_seconds": 0.0}, "zero_duration"),
    ],
)
def test_a_window_that_cannot_be_is_invalid(changes, code):
    found = verdict([window(**changes)] * 8)
    assert found.verdict == "INVALID"
    assert found.reasons[0].startswith(code)


def test_windows_of_older_records_are_not_punished_for_what_they_lack():
    old = window(devices=(), ticks=None, tick_seconds=None, window_seconds=1.0, integrated=None)
    assert verdict([old]).reasons == ()
