"""Energy counters: cumulated joules since some origin, or the reason why there are none.

`find(device)` returns the counter for a device. A machine without one gets a `Null` counter
whose every reading is unavailable with that reason: code that meters energy never asks `if`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from compresskit.measure.counters.null import Null
from compresskit.measure.counters.nvml import open_nvml
from compresskit.measure.counters.rapl import open_rapl

if TYPE_CHECKING:
    from compresskit.device import Device


class EnergyCounter(Protocol):
    """Cumulated energy of one scope."""

    @property
    def source(self) -> str:
        """Name of the counter."""

    @property
    def scope(self) -> str:
        """What the counter covers: gpu, package ..."""

    def joules(self) -> float | None:
        """Energy since an arbitrary origin, or None where there is no counter."""

    def reason(self) -> str:
        """Why there is no reading."""


def find(device: Device) -> EnergyCounter:
    """The counter that covers `device`: NVML for CUDA, RAPL for the CPU."""
    found = open_nvml() if device.kind == "cuda" else open_rapl()
    return Null(found) if isinstance(found, str) else found


__all__ = ["EnergyCounter", "Null", "find"]
