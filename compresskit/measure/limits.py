"""What this machine can do at best, measured with the library that runs the models.

    copy        one buffer onto another, each far larger than the last-level cache: bytes read plus
                bytes written per second
    matmul      a square product in the type that the device computes in: 2 n³ operations
    dispatch    the time of an operation on one element: what every operation of a step pays,
                whatever its size

A limit is the best of several goes: whatever else runs on the machine only ever takes away. The
result stands in the machine file and from there in each record, and `compresskit.metrics.roofline`
holds decode steps against it.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from compresskit.device import synchronizer
from compresskit.measure import environment
from compresskit.record import Limits, Measured, Reading, Unavailable
from compresskit.traits import Trait
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.device import Device

_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_BEYOND = 8
"""A buffer is at least so many times the last-level cache: what stays in it is then a small part."""
_LEAST_BUFFER, _MOST_BUFFER = 2**28, 2**31
_OF_FREE = 8
"""Two buffers take a quarter of the free memory at most."""


class Sizes(NamedTuple):
    """How much work each measurement is."""

    buffer_bytes: int
    """Of each of the two buffers."""
    matmul: int
    """n of an n × n product."""
    dispatches: int = 5000
    goes: int = 25


def sizes(device: Device) -> Sizes | Unavailable:
    """Choose sizes for `device`, or say why its memory cannot be measured."""
    if device.kind == "cuda":
        cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
        free = int(torch.cuda.mem_get_info()[0])
    else:
        cache, free = last_level_cache() or 2**26, int(psutil.virtual_memory().available)
    wanted = min(_MOST_BUFFER, max(_LEAST_BUFFER, _BEYOND * cache))
    buffer = min(wanted, free // _OF_FREE)
    if buffer < _BEYOND / 2 * cache:
        return Unavailable(
            reason=f"{free >> 20} MiB of free memory do not hold buffers far larger than the "
            f"last-level cache ({cache >> 20} MiB)"
        )
    return Sizes(buffer, matmul=8192 if device.kind == "cuda" else 1024)


def last_level_cache(folder: Path = _CPU_CACHES) -> int | None:
    """Bytes of the largest cache of the first CPU, where Linux tells."""
    found = []
    for path in folder.glob("index*/size"):
        told = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if told:
            found.append(int(told[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[told[2]])
    return max(found, default=None)


def measure(
    device: Device,
    *,
    threads: int = 1,
    work: Sizes | Unavailable | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Limits:
    """Measure the limits of `device`; takes a few seconds.

    `threads` are CPU threads of torch, as many as the runs use; on a GPU they do not matter.
    """
    chosen = sizes(device) if work is None else work
    dtype = torch.bfloat16 if Trait.BF16 in device.traits else torch.float32
    timer = _Timer(device, clock)
    with _threads(threads), torch.inference_mode():
        if isinstance(chosen, Unavailable):
            copy: Reading = chosen
            chosen = Sizes(0, matmul=1024)
        else:
            copy = timer.copy(chosen)
        return Limits(
            copy_bytes_per_second=copy,
            matmul_flops_per_second=timer.matmul(chosen, dtype),
            dispatch_seconds=timer.dispatch(chosen),
            threads=threads if device.kind == "cpu" else None,
            dtype=str(dtype).removeprefix("torch."),
            measured_at=environment.now(),
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Timer:
    """Times work on one device, synchronised before and after."""

    def __init__(self, device: Device, clock: Callable[[], float]) -> None:
        self._torch, self._wait, self._clock = device.torch, synchronizer(device), clock

    def _best(self, work: Callable[[], object], goes: int) -> float:
        """Seconds of the fastest go; a first one, not counted, touches all pages and kernels."""
        work()
        seconds = []
        for _ in range(goes):
            self._wait()
            began = self._clock()
            work()
            self._wait()
            seconds.append(self._clock() - began)
        return min(seconds)

    def copy(self, work: Sizes) -> Reading:
        source = torch.ones(work.buffer_bytes, dtype=torch.uint8, device=self._torch)
        target = torch.zeros_like(source)
        seconds = self._best(lambda: target.copy_(source), work.goes)
        return Measured(
            value=2 * work.buffer_bytes / seconds,
            unit=Unit.BYTE_PER_SECOND,
            source=f"copy of {work.buffer_bytes / 2**20:.0f} MiB, read plus written, "
            f"best of {work.goes}",
        )

    def matmul(self, work: Sizes, dtype: torch.dtype) -> Reading:
        # Random values: a GPU draws less power, and clocks higher, on constant ones.
        one = torch.randn(work.matmul, work.matmul, dtype=dtype, device=self._torch)
        seconds = self._best(lambda: one @ one, work.goes)
        name = str(dtype).removeprefix("torch.")
        return Measured(
            value=2 * work.matmul**3 / seconds,
            unit=Unit.FLOP_PER_SECOND,
            source=f"{name} product {work.matmul} x {work.matmul}, best of {work.goes}",
        )

    def dispatch(self, work: Sizes) -> Reading:
        one = torch.zeros(1, device=self._torch)

        def launch() -> None:
            for _ in range(work.dispatches):
                one.add(1)

        return Measured(
            value=self._best(launch, work.goes) / work.dispatches,
            unit=Unit.SECOND,
            source=f"mean of {work.dispatches} additions to one element, best of {work.goes}",
        )
