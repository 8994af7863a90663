"""State of the machine beside the samples: load, clocks, temperature, throttling, other processes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from compresskit.measure import environment
from compresskit.record import Telemetry

if TYPE_CHECKING:
    from compresskit.device import Device


class Watch:
    """Looks at the machine when told to, between the timed windows and never within one."""

    def __init__(self, device: Device) -> None:
        """Begin the session's time."""
        self.device = device
        self._began = time.perf_counter()
        self._seen: list[Telemetry] = []

    def look(self) -> None:
        """Take one snapshot."""
        load = environment.load_average()
        self._seen.append(
            Telemetry(
                seconds=time.perf_counter() - self._began,
                load_average=None if load is None else load[0],
            )
        )

    def seen(self) -> tuple[Telemetry, ...]:
        """Every snapshot so far, in order."""
        return tuple(self._seen)
