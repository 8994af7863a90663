"""What a training has cost so far: seconds and joules, over all the sittings it was done in.

A training that is resumed goes on counting where its checkpoint stood. What came after that checkpoint
and was lost is not in the student, and not in the bill; the bill says what the student took.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from compresskit.measure.energy import power
from compresskit.measure.energy.metering import Edge, difference, judged
from compresskit.record import Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from compresskit.measure.energy.counters import AbstractCounter

_SELDOM = 1.0
"""Seconds between two readings for a budget: a counter may tick ten times a second only."""


class Effort:
    """Counts from the time it is entered; `earlier` sittings are added with `resume`."""

    def __init__(
        self, counter: AbstractCounter, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Nothing is counted yet."""
        self.counter, self._clock = counter, clock
        self._seconds = 0.0
        self._joules: Reading | None = None
        self._began = 0.0
        self._first: Edge | None = None
        self._trace: power.Trace | None = None
        self._sampling: AbstractContextManager[power.Trace] | None = None
        self._known: tuple[float, float | None] = (-_SELDOM, None)

    def __enter__(self) -> Self:
        """Begin to count."""
        self._began = self._clock()
        if self.counter.answers():
            self._sampling = power.sampled(self.counter)
            self._trace = self._sampling.__enter__()
            self._first = self._edge()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop sampling; what was counted can still be read."""
        if self._sampling is not None:
            self._sampling.__exit__(None, None, None)

    def resume(self, seconds: float, energy: Reading) -> None:
        """Add what earlier sittings took."""
        self._seconds, self._joules = seconds, energy

    def seconds(self) -> float:
        """Of all sittings."""
        return self._seconds + self._clock() - self._began

    def energy(self) -> Reading:
        """Joules of all sittings, or why there are none."""
        now = self._sitting()
        if self._joules is None or not isinstance(now, Measured):
            return now
        if not isinstance(self._joules, Measured):
            return Unavailable(reason=f"an earlier sitting has none: {_why(self._joules)}")
        return Measured(
            value=self._joules.value + now.value, unit=Unit.JOULE, source=self._joules.source
        )

    def joules(self) -> float | None:
        """Of all sittings, read once a second at most; None before there is a reading."""
        at, value = self._known
        now = self._clock() - self._began
        if now - at >= _SELDOM:
            reading = self.energy()
            value = reading.value if isinstance(reading, Measured) else value
            self._known = (now, value)
        return value

    def _edge(self) -> Edge | None:
        parts = self.counter.parts() if self.counter.cumulates else ()
        return None if parts is None else Edge(self._clock(), parts, {})

    def _sitting(self) -> Reading:
        """Joules since it was entered."""
        counter, first = self.counter, self._first
        last = None if first is None else self._edge()
        if first is None or last is None or self._trace is None:
            return Unavailable(reason=counter.reason())
        if not counter.cumulates:
            held = self._trace.integral(counter.source)
            return held or Unavailable(reason=counter.reason())
        beside = self._trace.integral(f"{counter.source}_power_integral")
        return judged(difference(counter, first, last), beside)


def _why(reading: Reading) -> str:
    return reading.reason if isinstance(reading, Unavailable) else "it was estimated"
