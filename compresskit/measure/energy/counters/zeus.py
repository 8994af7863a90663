"""Energy of AMD GPUs, Apple silicon and Jetson boards, through zeus (extra `zeus`).

Only the device layer of zeus is used, which reads counters: its monitor would start a busy
polling process for old boards, and its totals are 0.0 where nothing was counted. What one has to
know about the device layer (zeus 0.16):

    everything is in millijoules, also where an attribute or its documentation says otherwise
    0 and None both mean that there is no such counter; a counter since boot is never 0
    an odd die of an MI250 has no counter; the even one counts both
    a Jetson has no counter: zeus integrates its power rail ten times a second

Chosen only where there is no counter of our own, and never for a machine that has none for zeus.
"""

from __future__ import annotations

import platform
import queue
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from compresskit.errors import MissingExtra
from compresskit.measure.energy.counters.protocol import AbstractCounter
from compresskit.measure.nvml import hashed

if TYPE_CHECKING:
    from collections.abc import Sequence

_JETSON = Path("/etc/nv_tegra_release")


class Library(NamedTuple):
    """The two modules of zeus that are used; a test hands in its own."""

    device: Any
    errors: Any
    """Has `ZeusBaseError`."""


def load() -> Library:
    """Import zeus.

    Raises:
        MissingExtra: zeus is not installed.
    """
    if find_spec("zeus") is None:
        raise MissingExtra("zeus", extra="zeus")
    return Library(import_module("zeus.device"), import_module("zeus.exception"))


@final
class ZeusGpus(AbstractCounter):
    """Counters of AMD GPUs."""

    source = "zeus_amd_counter"
    scope = "gpu"

    def __init__(self, library: Library, gpus: Any, ordinals: Sequence[int]) -> None:
        """Cover the GPUs that torch calls by `ordinals`."""
        self.library, self.gpus, self.ordinals = library, gpus, tuple(ordinals)
        self.devices = tuple(hashed(f"zeus:{platform.node()}:{one}") for one in ordinals)

    def parts(self) -> tuple[float, ...] | None:
        """Joules of each GPU since its driver was loaded."""
        return self._of_each("get_total_energy_consumption")

    def watts(self) -> float | None:
        """Power of all GPUs now."""
        powers = self._of_each("get_instant_power_usage")
        return None if powers is None else sum(powers)

    def _of_each(self, function: str) -> tuple[float, ...] | None:
        try:
            milli = [getattr(self.gpus, function)(one) for one in self.ordinals]
        except (self.library.errors.ZeusBaseError, AttributeError, ValueError):
            return None
        return tuple(one / 1000 for one in milli) if all(milli) else None

    def reason(self) -> str:
        """Why a reading may be missing."""
        return "zeus has no energy counter for this GPU"


@final
class ZeusSoc(AbstractCounter):
    """A system on a chip: one number for CPU, GPU and accelerators, memory apart."""

    scope = "soc"

    def __init__(self, library: Library, soc: Any) -> None:
        """Ask `soc` once, to learn which rails it has."""
        self.library, self.soc = library, soc
        self.devices = (hashed(f"zeus:{platform.node()}"),)
        jetson = hasattr(self._ask(), "total_energy_mj")
        self.source = "zeus_jetson_integral" if jetson else "zeus_apple_counter"
        # A Jetson's total rail feeds the whole module, memory included.
        self.scope = "module" if jetson else "soc"
        self._rails = (
            ("total_energy_mj",) if jetson else ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "ane_mj")
        )

    def parts(self) -> tuple[float, ...] | None:
        """Joules of the rails that are there."""
        answer = self._ask()
        milli = [one for rail in self._rails if (one := getattr(answer, rail, None))]
        return (sum(milli) / 1000,) if milli else None

    def apart(self) -> dict[str, float]:
        """Joules of the memory, where it has a rail."""
        milli = getattr(self._ask(), "dram_mj", None)
        return {"dram": milli / 1000} if milli else {}

    def _ask(self) -> Any:
        try:
            return self.soc.get_total_energy_consumption()
        except (self.library.errors.ZeusBaseError, ValueError, RuntimeError, queue.Empty):
            return None

    def reason(self) -> str:
        """Why a reading may be missing."""
        return "zeus has no energy counter for this chip"


def open_zeus(
    kind: str, ordinals: Sequence[int] = (0,), *, library: Library | None = None
) -> AbstractCounter | str | None:
    """Return zeus' counter, why there is none, or None where zeus has nothing for such a machine."""
    if library is None:
        if not _bears_on(kind):
            return None
        try:
            library = load()
        except MissingExtra as error:
            return str(error)
    try:
        counter = _amd(library, ordinals) if _is_amd(kind) else _soc(library)
    except library.errors.ZeusBaseError as error:
        return f"zeus: {error}"
    return counter if counter.parts() is not None else counter.reason()


def _amd(library: Library, ordinals: Sequence[int]) -> ZeusGpus:
    return ZeusGpus(library, library.device.get_gpus(), ordinals)


def _soc(library: Library) -> ZeusSoc:
    return ZeusSoc(library, library.device.get_soc())


def _is_amd(kind: str) -> bool:
    return kind == "cuda" and not _JETSON.exists()


def _bears_on(kind: str) -> bool:
    """Is there anything here that zeus can read and we cannot?"""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return _JETSON.exists() or (
        torch.version.hip is not None if kind == "cuda" else apple  # torch calls AMD's GPUs cuda
    )
