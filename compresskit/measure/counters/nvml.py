"""Energy of the GPU board from NVML's cumulative counter (Volta and later).

`nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded, for the
whole board. A MIG slice would show the whole GPU's energy, so it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Nvml:
    """NVML's energy counter of one GPU."""

    handle: Any
    pynvml: Any
    source: str = "nvml_counter"
    scope: str = "gpu"

    def joules(self) -> float | None:
        """Cumulated energy in joules; None if the driver stops answering."""
        try:
            millijoules: int = self.pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        except self.pynvml.NVMLError:
            return None
        return millijoules / 1000

    def reason(self) -> str:
        """Why a reading may be missing."""
        return "NVML energy counter did not answer"


def open_nvml() -> Nvml | str:
    """Return the counter of the first visible GPU, or the reason why there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(_physical_index())
    except pynvml.NVMLError as error:
        return f"no NVML: {error}"
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:
        current = 0
    if current:
        return "MIG is on: NVML's counter covers the whole GPU, not the slice"
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return f"NVML energy counter not supported: {error}"
    return Nvml(handle, pynvml)


def _physical_index() -> int:
    """NVML counts physical devices; CUDA_VISIBLE_DEVICES may renumber them for torch."""
    import os

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return int(first) if first.isdigit() else 0
