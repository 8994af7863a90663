"""How often does an energy counter move? It depends on the board and its driver: 1 to 500 ms.

    window L, tick T    worst error of a window that begins and ends anywhere: T / L

So a window holds at least `FEWEST_TICKS` of them. T is measured once per run, while the device
works, because no manual gives it for the driver at hand.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

from compresskit.stats import median

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.measure.energy.counters import AbstractCounter

FEWEST_TICKS = 100
"""In one window: leaves an error of at most 1 %."""
_FEWEST_CHANGES, _ENOUGH_CHANGES = 5, 50
_LONGEST, _POLL = 3.0, 0.001


def tick_seconds(
    counter: AbstractCounter,
    *,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> float | None:
    """Median time between two changes of the counter: of the slowest device, where there are several.

    Polls every millisecond for at most three seconds. None where a device changed fewer than
    five times, or stopped answering.
    """
    began = clock()
    last = counter.parts()
    changes: list[list[float]] = [[] for _ in last or ()]
    while clock() - began < _LONGEST:
        pause(_POLL)
        now = counter.parts()
        if now is None or last is None:
            return None
        at = clock()
        for seen, before, after in zip(changes, last, now, strict=True):
            if after != before:
                seen.append(at)
        last = now
        if all(len(seen) >= _ENOUGH_CHANGES for seen in changes):
            break
    if not changes or any(len(seen) < _FEWEST_CHANGES for seen in changes):
        return None
    return max(median([after - before for before, after in pairwise(seen)]) for seen in changes)


def while_busy(counter: AbstractCounter, work: Callable[[], object]) -> float | None:
    """`tick_seconds` in a thread, with `work` repeated beside it."""
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(tick_seconds, counter)
        while not found.done():
            work()
        return found.result()
