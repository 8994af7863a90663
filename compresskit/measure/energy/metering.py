"""Energy of a kind of work over one window: repeat the work until the window is long enough.

Counters tick every 1 to 500 ms, so the energy of one short request cannot be read. The work is
repeated for at least `seconds`; the reading is the counter's difference over the whole window, and
the tokens delivered in it are the denominator.

    the counter did not move, ran backwards or stopped   unavailable, never 0 J
    counter and integrated power differ tenfold          unavailable: one of them is broken
    no counter, but a power sensor                       the integral is the reading, and says so
    neither                                              nothing is run, nothing is waited for

The window is not aligned with the counter's ticks: requests would have to be cut at a tick. The
error that remains is at most tick over window and is stored as `quantisation`.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from compresskit.measure.energy import power
from compresskit.record import EnergyWindow, Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from compresskit.measure.energy.counters import AbstractCounter

    Sampled = Callable[[AbstractCounter], AbstractContextManager[power.Trace]]

_AGREE = (0.1, 10.0)
"""A counter outside this range of the integrated power is refused, as zeus does."""


class Edge(NamedTuple):
    """One end of a window: seconds, cumulated joules by device, joules of domains apart."""

    at: float
    parts: tuple[float, ...]
    apart: dict[str, float]


class Window:
    """The time between two readings of a counter; `stored` tells the energy in it."""

    def __init__(self, counter: AbstractCounter, clock: Callable[[], float]) -> None:
        """Read the counter: the window has begun, unless nothing answers."""
        self.counter, self._clock = counter, clock
        self._first = self._edge()
        self._last: Edge | None = None
        self._seconds = 0.0
        self._trace: power.Trace | None = None

    @property
    def counting(self) -> bool:
        """Whether there is anything to meter."""
        return self._first is not None

    def seconds(self) -> float:
        """Time since the beginning."""
        return 0.0 if self._first is None else self._clock() - self._first.at

    def sampled(self, trace: power.Trace) -> None:
        """Power is being sampled into `trace`."""
        self._trace = trace

    def close(self) -> None:
        """Read the counter again: the window is over."""
        self._last = self._edge()
        self._seconds = self.seconds()
        if self._first is not None and self._last is not None:
            self._seconds = self._last.at - self._first.at

    def _edge(self) -> Edge | None:
        """Read everything at once, the time beside the counter; None where it does not answer."""
        if not self.counter.cumulates:
            return Edge(self._clock(), (), {}) if self.counter.answers() else None
        parts = self.counter.parts()
        at = self._clock()
        return None if parts is None else Edge(at, parts, self.counter.apart())

    def stored(self, tokens: int | None = None, *, tick: float | None = None) -> EnergyWindow:
        """The window as a record keeps it; `tick` is the counter's measured period in seconds."""
        counter, first, last = self.counter, self._first, self._last
        lost = Unavailable(reason=counter.reason())
        if first is None:
            return EnergyWindow(reading=lost)
        shape = {
            "window_seconds": self._seconds,
            "tokens": tokens,
            "scope": counter.scope,
            "devices": counter.devices,
        }
        integral = None if self._trace is None else self._trace.integral(_integral_of(counter))
        if not counter.cumulates:
            return EnergyWindow(reading=integral or lost, **shape)
        if last is None:
            return EnergyWindow(reading=lost, integrated=integral, **shape)
        return EnergyWindow(
            reading=judged(difference(counter, first, last), integral),
            reads=((0.0, sum(first.parts)), (self._seconds, sum(last.parts))),
            ticks=None if tick is None else int(self._seconds / tick),
            tick_seconds=tick,
            quantisation=None if tick is None else tick / self._seconds,
            integrated=integral,
            domains=_domains(counter, first, last),
            **shape,
        )


@contextmanager
def metered(
    counter: AbstractCounter,
    *,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
    sampled: Sampled = power.sampled,
) -> Iterator[Window]:
    """Meter the enclosed block, which runs once whether or not there is a counter."""
    synchronize()
    window = Window(counter, clock)
    if not window.counting:
        yield window
        return
    with sampled(counter) as trace:
        window.sampled(trace)
        yield window
        synchronize()
    window.close()


def meter(
    work: Callable[[], int],
    counter: AbstractCounter,
    *,
    seconds: float,
    synchronize: Callable[[], None],
    tick: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sampled: Sampled = power.sampled,
) -> EnergyWindow:
    """Repeat `work` (which returns the tokens it delivered) for at least `seconds` and read `counter`.

    Where there is no counter, nothing is run and the reason is returned. `tick` is the counter's
    measured period.
    """
    tokens = 0
    with metered(counter, synchronize=synchronize, clock=clock, sampled=sampled) as window:
        while window.counting and window.seconds() < seconds:
            tokens += work()
            synchronize()
    return window.stored(tokens, tick=tick)


def difference(counter: AbstractCounter, first: Edge, last: Edge) -> Reading:
    """Joules between two edges, or why they are none. Each device's counter has to have moved."""
    deltas = [after - before for before, after in zip(first.parts, last.parts, strict=True)]
    if any(delta < 0 for delta in deltas):
        return Unavailable(reason="counter went backwards (reset?)")
    if not all(deltas):
        return Unavailable(reason="counter did not tick")
    joules, seconds = counter.total(deltas), last.at - first.at
    most = counter.highest_watts
    if most is not None and joules > most * seconds:
        return Unavailable(
            reason=f"counter jumped by {joules:.3g} J in {seconds:.3g} s, more than the device can "
            "draw (reset?)"
        )
    return Measured(value=joules, unit=Unit.JOULE, source=counter.source)


def judged(counted: Reading, integral: Reading | None) -> Reading:
    """The counter's reading, unless the integrated power says that it cannot be."""
    if not isinstance(counted, Measured) or not isinstance(integral, Measured):
        return counted
    ratio = counted.value / integral.value
    if _AGREE[0] <= ratio <= _AGREE[1]:
        return counted
    return Unavailable(
        reason=f"counter gave {counted.value:.3g} J where the integrated power is "
        f"{integral.value:.3g} J: one of them is broken"
    )


def _domains(counter: AbstractCounter, first: Edge, last: Edge) -> dict[str, Reading]:
    readings: dict[str, Reading] = {}
    for name in first.apart.keys() & last.apart.keys():
        joules = last.apart[name] - first.apart[name]
        readings[name] = (
            Measured(value=joules, unit=Unit.JOULE, source=f"{counter.source}_{name}")
            if joules > 0
            else Unavailable(reason="counter did not tick")
        )
    return readings


def _integral_of(counter: AbstractCounter) -> str:
    """Name of the integral that stands beside, or in place of, a counter."""
    if not counter.cumulates:
        return counter.source
    return f"{counter.source.removesuffix('_counter')}_power_integral"
