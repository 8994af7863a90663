"""The CPU model: what it multiplies, and that it never looks like a measurement."""

from __future__ import annotations

import pytest

from compresskit.measure.energy import estimate


def test_an_estimate_is_watts_per_core_times_processor_time(world):
    # Two threads, busy three quarters of the time.
    window = estimate.meter(
        world.work(), seconds=10.0, clock=world.clock, processor=lambda: 1.5 * world.now
    )
    # By hand: 34 goes of 0.3 s at 1.5 cores of 13.3 W.
    assert window.reading.kind == "estimated"
    assert window.reading.value == pytest.approx(13.3 * 1.5 * 10.2)
    assert "13.3 W per core" in window.reading.model
    assert (window.scope, window.devices, window.tokens) == ("cpu", (), 34 * 8)
    assert window.reads == ()


def test_no_processor_time_is_no_energy(world):
    window = estimate.meter(world.work(), seconds=1.0, clock=world.clock, processor=lambda: 3.0)
    assert window.reading.kind == "unavailable"
