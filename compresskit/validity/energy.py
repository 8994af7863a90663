"""Rules about the energy windows.

Only windows that name their devices are judged: those of older records hold neither ticks nor a
cross-check, and are not punished for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.record import Measured
from compresskit.validity.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.record import EnergyWindow, Record

SHORTEST_WINDOW = 10.0
"""Seconds. Shorter ones read too low: the power has not settled."""
FEWEST_TICKS = 100
FEWEST_WINDOWS = 5
AGREEMENT = 0.10
"""Allowed difference of counter and integrated power."""


def _kinds(record: Record) -> Iterator[tuple[str, list[EnergyWindow]]]:
    for kind in ("prefill", "generate"):
        found = [
            window
            for block in record.blocks
            if block.passes.energy is not None
            for window in getattr(block.passes.energy, kind)
        ]
        if found:
            yield kind, found


def _judged(windows: list[EnergyWindow]) -> list[tuple[EnergyWindow, Measured]]:
    return [
        (window, window.reading)
        for window in windows
        if isinstance(window.reading, Measured) and window.devices
    ]


def some_energy(record: Record) -> Iterator[Finding]:
    """No work is done without energy, and no window lasts no time."""
    for kind, windows in _kinds(record):
        if any(isinstance(one.reading, Measured) and one.reading.value <= 0 for one in windows):
            yield Finding(True, "zero_energy", f"a {kind} window claims to have drawn nothing")
        if any(one.window_seconds is not None and one.window_seconds <= 0 for one in windows):
            yield Finding(True, "zero_duration", f"a {kind} window of energy took no time")


def long_windows(record: Record) -> Iterator[Finding]:
    """A window holds enough ticks of its counter, and lasts until the power has settled."""
    for kind, windows in _kinds(record):
        for window, reading in _judged(windows):
            if problem := _too_short(window, reading):
                yield Finding(False, "window_too_short", f"{kind} windows {problem}")
                break


def _too_short(window: EnergyWindow, reading: Measured) -> str | None:
    seconds = window.window_seconds
    if seconds is not None and seconds < SHORTEST_WINDOW:
        return f"of {seconds:.1f} s, shorter than {SHORTEST_WINDOW:.0f} s"
    if reading.source.endswith("_integral"):
        return None  # sampled by us: it has no ticks
    if window.ticks is None:
        return "have an unknown error: the counter moved too seldom to measure its tick"
    if window.ticks < FEWEST_TICKS:
        return f"hold {window.ticks} ticks of the counter, fewer than {FEWEST_TICKS}"
    return None


def enough_windows(record: Record) -> Iterator[Finding]:
    """Several windows, or nobody knows how far they lie apart."""
    for kind, windows in _kinds(record):
        count = len(_judged(windows))
        if 0 < count < FEWEST_WINDOWS:
            detail = f"{count} {kind} windows, fewer than {FEWEST_WINDOWS}"
            yield Finding(False, "too_few_windows", detail)
        lost = next((one.reading for one in windows if one.reading.kind == "unavailable"), None)
        if count and lost is not None and lost.kind == "unavailable":
            detail = f"after {count} {kind} windows the counter was lost: {lost.reason}"
            yield Finding(False, "energy_lost", detail)


def agreeing_meters(record: Record) -> Iterator[Finding]:
    """The counter and the power integrated beside it tell the same energy."""
    for kind, windows in _kinds(record):
        both = [
            (reading.value, window.integrated.value)
            for window, reading in _judged(windows)
            if isinstance(window.integrated, Measured)
        ]
        power = sum(integrated for _, integrated in both)
        if power <= 0:
            continue
        ratio = sum(counted for counted, _ in both) / power
        if abs(ratio - 1) > AGREEMENT:
            detail = f"the counter gives {ratio:.2f} times the integrated power ({kind})"
            yield Finding(False, "energy_cross_check", detail)
