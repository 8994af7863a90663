"""Energy counters: cumulated joules since some origin, or the reason why there are none.

`find(device)` returns the counter for a device. A machine without one gets a `Null` counter
whose every reading is unavailable with that reason: code that meters energy never asks `if`.

    CUDA device   NVML's counter, else NVML's power integrated, else zeus (AMD, Jetson)
    CPU           RAPL, else zeus (Apple, Jetson)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.measure.energy.counters.null import Null
from compresskit.measure.energy.counters.nvml import open_nvml
from compresskit.measure.energy.counters.protocol import AbstractCounter
from compresskit.measure.energy.counters.rapl import open_rapl
from compresskit.measure.energy.counters.zeus import open_zeus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.device import Device


def find(device: Device, ordinals: Sequence[int] = (0,)) -> AbstractCounter:
    """The counter that covers `device`; `ordinals` are torch's numbers of the GPUs in use."""
    native = open_nvml(ordinals) if device.kind == "cuda" else open_rapl()
    if not isinstance(native, str):
        return native
    other = open_zeus(device.kind, ordinals)
    if other is None:
        return Null(native)
    return Null(f"{native}; {other}") if isinstance(other, str) else other


__all__ = ["AbstractCounter", "Null", "find"]
