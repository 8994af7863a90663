"""Energy of a kind of work over one window: repeat the work until the window is long enough.

Counters tick every 10 to 500 ms, so the energy of one short request cannot be read. The work is
repeated for at least `seconds`; the reading is the counter's difference over the whole window, and
the tokens delivered in it are the denominator. A counter that did not move is `unavailable`,
never 0 J.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from compresskit.record import EnergyWindow, Measured, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.measure.counters import EnergyCounter


def meter(
    work: Callable[[], int],
    counter: EnergyCounter,
    *,
    seconds: float,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> EnergyWindow:
    """Repeat `work` (which returns the tokens it delivered) for at least `seconds` and read `counter`.

    Where there is no counter, nothing is run and the reason is returned.
    """
    synchronize()
    first = counter.joules()
    if first is None:
        return EnergyWindow(reading=Unavailable(reason=counter.reason()))
    began, tokens = clock(), 0
    while clock() - began < seconds:
        tokens += work()
        synchronize()
    ended, last = clock(), counter.joules()
    window = ended - began
    if last is None:
        return EnergyWindow(
            reading=Unavailable(reason=counter.reason()), window_seconds=window, tokens=tokens
        )
    edges = ((0.0, first), (window, last))
    if last <= first:
        why = "counter did not tick" if last == first else "counter went backwards (reset?)"
        return EnergyWindow(
            reading=Unavailable(reason=why),
            window_seconds=window,
            tokens=tokens,
            reads=edges,
            scope=counter.scope,
        )
    return EnergyWindow(
        reading=Measured(value=last - first, unit=Unit.JOULE, source=counter.source),
        window_seconds=window,
        tokens=tokens,
        reads=edges,
        scope=counter.scope,
    )
