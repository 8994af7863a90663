"""Where the bytes are: weights by storage class, the cache, and peaks per window.

    weights   every tensor that a module owns, shared storage counted once
    cache     every tensor that the cache's layers own
    peaks     CUDA: allocator peaks; CPU: the kernel's high-water mark of resident memory,
              reset before each window (Linux), else unavailable with the reason

Resident memory read right after a memory-mapped load understates, so windows end after a
forward pass has touched every weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compresskit.record import Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from compresskit.device import Device

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def weight_bytes(model: Any) -> dict[str, int]:
    """Bytes held by `model`, by class: packed modules report their own, the rest is dense or buffer.

    A module with `held_bytes()` (class -> bytes) answers for all that it holds: packed layouts
    may be opaque, and torch's element size lies about them.
    """
    totals: dict[str, int] = {}
    seen: set[int] = set()

    def add(kind: str, size: int) -> None:
        totals[kind] = totals.get(kind, 0) + size

    for module in model.modules():
        if hasattr(module, "held_bytes"):
            for kind, size in module.held_bytes().items():
                add(kind, size)
            continue
        for kind, tensors in (("dense", module._parameters), ("buffer", module._buffers)):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    add(kind, storage.nbytes())
    return totals


class PeakMeter:
    """Peak memory of the windows of one run; `start` opens a window, `read` reads it."""

    def __init__(self, device: Device) -> None:
        """Watch the allocator of a CUDA device, or this process's resident memory."""
        self.cuda = device.kind == "cuda"
        self.resettable = _can_reset()

    def start(self) -> None:
        """Open a window: forget earlier peaks."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if self.resettable:
            _CLEAR.write_text("5")

    def read(self) -> dict[str, Reading]:
        """Peaks since `start`, by counter."""
        readings: dict[str, Reading] = {"rss": self._rss()}
        if self.cuda:
            for name, value in (
                ("cuda_allocated", torch.cuda.max_memory_allocated()),
                ("cuda_reserved", torch.cuda.max_memory_reserved()),
            ):
                readings[name] = Measured(value=value, unit=Unit.BYTE, source=f"torch.cuda.{name}")
        return readings

    def _rss(self) -> Reading:
        if not self.resettable:
            return Unavailable(reason="resident peak: /proc/self/clear_refs is not writable here")
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return Measured(value=int(line.split()[1]) * 1024, unit=Unit.BYTE, source="VmHWM")
        return Unavailable(reason="resident peak: no VmHWM in /proc/self/status")


def _can_reset() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()
