"""Power over time: sampled ten times a second beside an energy window, then integrated.

The integral checks the counter, and stands in for it where there is none. Sampling runs in a
thread of its own, within energy windows only: no speed is ever timed beside it. The same thread
reads counters that wrap around.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from compresskit.record import Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.measure.energy.counters import AbstractCounter

PERIOD = 0.1
_LONGEST_GAP = 1.0
"""A sensor that was silent for longer has missed what happened meanwhile."""
_FEWEST_SAMPLES = 10


class Trace:
    """Power of one counter's devices over one window."""

    def __init__(
        self, counter: AbstractCounter, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Nothing sampled yet."""
        self.counter, self._clock = counter, clock
        self.samples: list[tuple[float, float]] = []
        """Seconds on the clock, watts."""
        self.silent = False
        """The sensor has failed to answer after it had answered."""
        self._polled = clock()

    def look(self) -> None:
        """Take one sample, and keep a counter that wraps from being missed."""
        watts, now = self.counter.watts(), self._clock()
        if watts is None:
            self.silent = bool(self.samples)
        else:
            self.samples.append((now, watts))
        every = self.counter.poll_every
        if every is not None and now - self._polled >= every:
            self.counter.parts()
            self._polled = now

    def integral(self, source: str) -> Reading | None:
        """Joules by the trapezoidal rule; None where the counter has no power sensor at all."""
        if not self.samples:
            return None
        if self.silent:
            return Unavailable(reason="the power sensor stopped answering within the window")
        if len(self.samples) < _FEWEST_SAMPLES:
            return Unavailable(
                reason=f"power was sampled {len(self.samples)} times in the window, "
                f"fewer than {_FEWEST_SAMPLES}"
            )
        steps = list(pairwise(self.samples))
        if max(after[0] - before[0] for before, after in steps) > _LONGEST_GAP:
            return Unavailable(reason="power was not sampled for more than a second")
        joules = sum((after[0] - before[0]) * (after[1] + before[1]) / 2 for before, after in steps)
        if joules <= 0:
            return Unavailable(reason="the power sensor gave no power")
        return Measured(value=joules, unit=Unit.JOULE, source=source)


@contextmanager
def sampled(
    counter: AbstractCounter,
    *,
    clock: Callable[[], float] = time.perf_counter,
    period: float = PERIOD,
) -> Iterator[Trace]:
    """Sample at both edges of the block and every `period` seconds in between."""
    trace, over = Trace(counter, clock=clock), threading.Event()
    trace.look()
    if not trace.samples and counter.poll_every is None:
        yield trace
        return
    thread = threading.Thread(target=_keep_looking, args=(trace, over, period), daemon=True)
    thread.start()
    try:
        yield trace
    finally:
        over.set()
        thread.join()
        trace.look()


def _keep_looking(trace: Trace, over: threading.Event, period: float) -> None:
    while not over.wait(period):
        trace.look()
