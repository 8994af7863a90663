"""A fixed piece of work, timed beside every turn: how fast was the machine itself just now?

Two runs of unlike days cannot be compared by the clock alone: the machine may have been slower.
The yardstick never changes with the code under test. It does on the device what decoding does:
many small operations launched from Python, then a product that streams a few megabytes.
Where it has become slower, a slower run proves nothing, and the comparison asks for more.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from compresskit.device import synchronizer
from compresskit.measure import contention
from compresskit.stats import median

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.device import Device

_SMALL, _STEPS, _WIDE = 64, 2000, 1536
_READINGS = 3


class Yardstick:
    """The work, its tensors made once."""

    def __init__(self, device: Device, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Prepare the tensors on `device`."""
        torch_device = device.torch
        generator = torch.Generator().manual_seed(0)
        self._small = torch.randn(1, _SMALL, generator=generator).to(torch_device)
        self._mix = torch.randn(_SMALL, _SMALL, generator=generator).to(torch_device)
        self._wide = torch.randn(_WIDE, _WIDE, generator=generator).to(torch_device)
        self._vector = torch.randn(_WIDE, 1, generator=generator).to(torch_device)
        self._wait, self._clock = synchronizer(device), clock
        self._work()

    def read(self) -> float:
        """Seconds of one go net of waiting for a CPU, the median of three."""
        seconds = []
        for _ in range(_READINGS):
            self._wait()
            with contention.watch() as waiting:
                began = self._clock()
                self._work()
                self._wait()
                took = self._clock() - began
            waited = waiting.seconds or 0.0
            seconds.append(took - waited if took > waited else took)
        return median(seconds)

    @torch.inference_mode()
    def _work(self) -> None:
        x = self._small
        for _ in range(_STEPS):
            x = torch.tanh(x @ self._mix) + self._small
        for _ in range(8):
            self._wide @ self._vector
