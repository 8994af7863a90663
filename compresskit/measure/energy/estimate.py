"""CPU energy where nothing counts it: a model, asked for with `--estimate-energy`, always marked.

    joules = WATTS_PER_CORE x processor seconds of this process

Processor seconds are cores in use times utilisation times time, so this is the formula of
Lannelongue, Grealey and Inouye 2021, "Green Algorithms: Quantifying the Carbon Footprint of
Computation" (Advanced Science, doi 10.1002/advs.202100707) without its terms for memory and for
the building. The constant is the mean design power per core of the 60 processors that their
calculator tabulates; single ones lie between 4 and 24 W. It knows nothing of the clock, the
instructions or the idle cores: two artefacts differ by it only as their processor time does.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from compresskit.record import EnergyWindow, Estimated, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

WATTS_PER_CORE = 13.3
MODEL = (
    f"{WATTS_PER_CORE} W per core (mean design power per core in Green Algorithms' table) times "
    "processor seconds of the process; without memory and idle power"
)


def meter(
    work: Callable[[], int],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    processor: Callable[[], float] = time.process_time,
) -> EnergyWindow:
    """Repeat `work` (which returns the tokens it delivered) for at least `seconds`.

    `processor` gives the seconds that all threads of this process have spent on a CPU.
    """
    began, spent, tokens = clock(), processor(), 0
    while clock() - began < seconds:
        tokens += work()
    window, busy = clock() - began, processor() - spent
    if busy <= 0:
        return EnergyWindow(
            reading=Unavailable(reason="the process has used no processor time"),
            window_seconds=window,
            tokens=tokens,
        )
    return EnergyWindow(
        reading=Estimated(value=WATTS_PER_CORE * busy, unit=Unit.JOULE, model=MODEL),
        window_seconds=window,
        tokens=tokens,
        scope="cpu",
    )
