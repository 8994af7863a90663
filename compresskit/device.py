"""The only hardware probe: what this machine can do, asked once per process.

`resolve("cuda")` raises where there is no CUDA; `resolve("auto")` falls back to the CPU and the
record names the device, so that a fallback is never silent.
"""

from __future__ import annotations

import functools
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import torch

from compresskit.errors import SpecError
from compresskit.spec import Frozen
from compresskit.traits import Trait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Device(Frozen):
    """One device; what it can do is in `traits` (sorted, so that the record is stable)."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    capability: str | None = None
    """CUDA compute capability, or the widest CPU instruction set that matters here."""
    traits: tuple[Trait, ...] = ()
    ordinals: tuple[int, ...] = (0,)
    """torch's numbers of the GPUs that a run uses: the first one, unless its model is placed on others."""

    def using(self, ordinals: Iterable[int]) -> Device:
        """The same device for a model that lies on the GPUs `ordinals`; none leaves it as it is."""
        found = tuple(sorted(set(ordinals)))
        return self.model_copy(update={"ordinals": found}) if found else self

    @property
    def torch(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.kind)


def resolve(wish: str = "auto") -> Device:
    """Return the device for `auto`, `cpu` or `cuda`; raise `SpecError` if it is not there."""
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise SpecError(
            "device 'cuda' was asked for, but torch sees no CUDA device. Use --device cpu or auto."
        )
    return _cuda() if available and wish != "cpu" else _cpu()


@functools.cache
def _cuda() -> Device:
    properties = torch.cuda.get_device_properties(0)
    major, minor = properties.major, properties.minor
    traits = {Trait.CUDA}
    if major >= 8:
        traits.add(Trait.BF16)
    if (major, minor) >= (8, 9):
        traits.add(Trait.FP8)
    if find_spec("triton") is not None:
        traits.add(Trait.TRITON)
    return Device(
        kind="cuda",
        name=properties.name,
        memory_bytes=properties.total_memory,
        capability=f"{major}.{minor}",
        traits=tuple(sorted(traits)),
    )


@functools.cache
def _cpu() -> Device:
    info = cpu_info()
    flags = info.flags
    widest = next(
        (f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags),
        platform.machine(),
    )
    traits = {Trait.BF16} if flags & {"amx_bf16", "avx512_bf16"} else set()
    return Device(
        kind="cpu",
        name=info.name,
        memory_bytes=psutil.virtual_memory().total,
        capability=widest,
        traits=tuple(sorted(traits)),
    )


class CpuInfo(Frozen):
    """Name and instruction-set flags of the CPU."""

    name: str
    flag_names: tuple[str, ...]

    @property
    def flags(self) -> set[str]:
        """The flags as a set."""
        return set(self.flag_names)


@functools.cache
def cpu_info() -> CpuInfo:
    """Read `/proc/cpuinfo` where it exists, else what `platform` knows."""
    path = Path("/proc/cpuinfo")
    name, flags = platform.processor() or platform.machine(), ""
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value
                break
    return CpuInfo(name=name, flag_names=tuple(flags.split()))


def synchronizer(device: Device) -> Callable[[], None]:
    """Return the call that waits until all work given to `device` is done."""
    if device.kind != "cuda":
        return _nothing
    if len(device.ordinals) == 1:
        return torch.cuda.synchronize
    return functools.partial(_wait_for, device.ordinals)


def _wait_for(ordinals: tuple[int, ...]) -> None:
    for ordinal in ordinals:
        torch.cuda.synchronize(ordinal)


def gpus(device: Device) -> range:
    """Numbers, as torch counts, of all GPUs that this process sees; none where `device` is the CPU."""
    return range(torch.cuda.device_count() if device.kind == "cuda" else 0)


def _nothing() -> None:
    """The CPU runs in order: there is nothing to wait for."""
