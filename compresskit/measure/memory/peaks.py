"""Peaks of memory by window: the highest marks since the window was opened.

    rss              the kernel's high-water mark of resident memory, reset by clear_refs (Linux)
    cuda_allocated   torch's allocator: blocks given out
    cuda_reserved    torch's allocator: blocks held, given out or not
    process_vram     NVML: all that this process holds on the GPU; sampled, so only where nothing
                     is timed

Of a model on several GPUs the marks are sums. Those of torch's allocator are then sums of peaks, each
GPU's at its own moment: no less than the peak of the sum, and named so in the source.

A window begins by giving freed memory back to the system, so that what an earlier phase has left in
the allocators is not charged to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compresskit.device import synchronizer
from compresskit.hf.modules import release_freed
from compresskit.record import Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from compresskit.device import Device
    from compresskit.measure.memory.vram import ProcessVram

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMeter:
    """Peak memory of the windows of one run; `start` opens a window, `read` reads it."""

    def __init__(self, device: Device, vram: ProcessVram | None = None) -> None:
        """Watch resident memory, and on a CUDA device torch's allocator; `vram` if it is sampled."""
        self.cuda = device.kind == "cuda"
        self._ordinals = device.ordinals
        self._wait = synchronizer(device)
        self.resettable = _can_reset()
        self._vram = vram

    def start(self, *, release: bool = True) -> None:
        """Open a window: forget earlier peaks, and `release` what earlier windows have freed."""
        if release:
            release_freed()
        if self.cuda:
            self._wait()
            if release:
                torch.cuda.empty_cache()
            for ordinal in self._ordinals:
                torch.cuda.reset_peak_memory_stats(ordinal)
        if self._vram is not None:
            self._vram.restart()
        if self.resettable:
            _CLEAR.write_text("5")

    def read(self) -> dict[str, Reading]:
        """Peaks since `start`, by counter."""
        readings: dict[str, Reading] = {"rss": self._rss()}
        if self.cuda:
            self._wait()
            several = len(self._ordinals) > 1
            of = f", sum of the peaks of {len(self._ordinals)} GPUs" if several else ""
            for name, mark in (
                ("cuda_allocated", torch.cuda.max_memory_allocated),
                ("cuda_reserved", torch.cuda.max_memory_reserved),
            ):
                value = sum(mark(ordinal) for ordinal in self._ordinals)
                source = f"torch.cuda.{name}{of}"
                readings[name] = Measured(value=value, unit=Unit.BYTE, source=source)
            readings["process_vram"] = (
                Unavailable(reason="not sampled here: polling would disturb what is timed")
                if self._vram is None
                else self._vram.peak()
            )
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
