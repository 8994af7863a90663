"""What NVML says this process holds on its GPUs: tensors, torch's reserve and the CUDA context.

There is no counter of the peak, so a thread looks every 10 ms; it runs only where nothing is timed.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from compresskit.measure.nvml import Gpu, open_gpus
from compresskit.record import Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

INTERVAL = 0.01
"""Seconds between two looks."""


class ProcessVram:
    """Memory of this process on the GPUs that a run uses, all of them together."""

    def __init__(
        self, gpus: tuple[Gpu, ...] | str | None = None, *, ordinals: Sequence[int] = (0,)
    ) -> None:
        """Find the GPUs that torch calls `cuda:<ordinal>`; `gpus` is for tests."""
        found = open_gpus(ordinals) if gpus is None else gpus
        self._gpus = () if isinstance(found, str) else found
        self._reason = found if isinstance(found, str) else ""
        self._peak: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def now(self) -> Reading:
        """What is held at this moment."""
        value = self._look()
        if value is None:
            return Unavailable(reason=f"process memory on the GPU: {self._reason}")
        return Measured(value=value, unit=Unit.BYTE, source="NVML usedGpuMemory")

    def _look(self) -> int | None:
        """Bytes on all GPUs; None if one of them does not tell: a sum of some would mean nothing."""
        held = [self._look_at(gpu) for gpu in self._gpus]
        known = [one for one in held if one is not None]
        return sum(known) if held and len(known) == len(held) else None

    def _look_at(self, gpu: Gpu) -> int | None:
        processes = gpu.ask("nvmlDeviceGetComputeRunningProcesses")
        if processes is None:
            self._reason = "NVML does not list processes here"
            return None
        # In a container NVML tells process ids of the host, among which ours is not.
        mine = [one.usedGpuMemory for one in processes if one.pid == os.getpid()]
        if not mine or mine[0] is None:
            self._reason = (
                "NVML does not tell the memory of this process"
                if mine
                else "NVML lists no process with our id (a container with ids of its own?)"
            )
            return None
        return int(mine[0])

    def __enter__(self) -> ProcessVram:
        """Start looking, unless a first look shows that there is nothing to see."""
        self._peak = self._look()
        if self._peak is not None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Stop looking."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._note()

    def _note(self) -> None:
        value = self._look()
        if value is not None and self._peak is not None:
            self._peak = max(self._peak, value)

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._peak is not None:
            self._peak = self._look()

    def peak(self) -> Reading:
        """The highest value seen since the last `restart`."""
        self._note()
        if self._peak is None:
            return Unavailable(reason=f"process memory on the GPU: {self._reason}")
        return Measured(value=self._peak, unit=Unit.BYTE, source="NVML usedGpuMemory, every 10 ms")
