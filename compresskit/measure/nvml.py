"""The GPUs of a run as NVML sees them, for the energy counter and for telemetry.

torch counts the visible devices, NVML all of them, in an order of its own; the UUID is what both
agree on. Every function takes the `pynvml` module as an argument, so that a test can hand in a
fake one. What the driver refuses to answer is None, never 0.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pynvml
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Gpu:
    """One physical GPU: NVML's handle, and the identifier that a record may show."""

    nvml: Any
    handle: Any
    device: str
    """First 12 hex digits of the SHA-256 of the UUID: tells boards apart, identifies none."""

    def ask(self, function: str, *arguments: Any) -> Any:
        """The answer of an NVML call about this GPU, or None where there is none.

        Old drivers lack functions and virtual GPUs refuse them: both are an absent answer.
        """
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except (self.nvml.NVMLError, AttributeError):
            return None


def hashed(uuid: str) -> str:
    """What a record stores in place of a serial number or UUID."""
    return hashlib.sha256(uuid.encode()).hexdigest()[:12]


def open_gpus(
    ordinals: Sequence[int] = (0,),
    *,
    nvml: Any = None,
    uuid_of: Callable[[int], str | None] | None = None,
) -> tuple[Gpu, ...] | str:
    """Open the GPUs that torch calls `cuda:<ordinal>`, or say why they cannot be asked.

    A MIG slice is refused: NVML's counters, clocks and processes are those of the whole GPU.
    """
    nvml = pynvml if nvml is None else nvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return f"no NVML: {error}"
    found = []
    for ordinal in ordinals:
        uuid = (uuid_of or torch_uuid)(ordinal)
        if uuid is not None and uuid.startswith("MIG-"):
            return _MIG
        try:
            handle = (
                nvml.nvmlDeviceGetHandleByIndex(ordinal)
                if uuid is None
                else nvml.nvmlDeviceGetHandleByUUID(uuid)
            )
            gpu = Gpu(nvml, handle, hashed(str(nvml.nvmlDeviceGetUUID(handle))))
        except nvml.NVMLError as error:
            return f"NVML does not know the GPU that torch calls cuda:{ordinal}: {error}"
        mode = gpu.ask("nvmlDeviceGetMigMode")
        if mode is not None and mode[0]:
            return _MIG
        found.append(gpu)
    return tuple(found)


_MIG = "MIG is on: NVML's counter covers the whole GPU, not the slice"


def torch_uuid(ordinal: int) -> str | None:
    """The UUID in NVML's spelling of the device that torch calls `cuda:<ordinal>`.

    None where torch does not tell, and only then NVML's own order has to do: it is torch's order
    unless CUDA_VISIBLE_DEVICES or CUDA_DEVICE_ORDER say otherwise.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if "MIG-" in visible:
        return next(part for part in visible.split(",") if "MIG-" in part).strip()
    try:
        uuid = getattr(torch.cuda.get_device_properties(ordinal), "uuid", None)
    except (RuntimeError, AssertionError):
        return None
    return None if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"


def power_watts(gpu: Gpu) -> float | None:
    """Power of the board now, in watts.

    Field 186 (instant) is preferred to 185 (average): the average of recent boards looks back
    over a whole second. `nvmlDeviceGetPowerUsage` is one or the other by generation, so it is
    not asked. Each field carries a return code of its own.
    """
    for name in ("NVML_FI_DEV_POWER_INSTANT", "NVML_FI_DEV_POWER_AVERAGE"):
        field = getattr(gpu.nvml, name, None)
        answer = None if field is None else gpu.ask("nvmlDeviceGetFieldValues", [(field, 0)])
        if not answer or answer[0].nvmlReturn != gpu.nvml.NVML_SUCCESS:
            continue
        return int(answer[0].value.uiVal) / 1000
    return None
