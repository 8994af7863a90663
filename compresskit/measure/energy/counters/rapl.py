"""Energy of the CPU packages from RAPL, through Linux' powercap files (Intel, and AMD since Zen).

Only `package-N` domains are summed: `core` and `uncore` are parts of them, `psys` contains them,
`dram` is shown apart. `intel-rapl-mmio` shows the same packages a second time and is not looked
at. Reading has needed root since Linux 5.10 (CVE-2020-8694); compresskit never asks for it.

The counters wrap at `max_energy_range_uj`, after minutes on a busy server: `poll_every` says how
often one has to look. Some processors of several dies show one socket-wide counter once per die
(`package-0-die-0`, `package-0-die-1`): dies of one package that agree within a joule over a
window are one counter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from compresskit.measure.energy.counters.protocol import AbstractCounter
from compresskit.measure.nvml import hashed

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path("/sys/class/powercap")

_ASSUMED_WATTS = 500.0
"""Of a package whose thermal design power is not told: the largest server parts of today."""
_IMPLAUSIBLE = 4.0
"""No package draws this many times its design power, averaged over a window."""
_MIRROR_JOULES = 1.0
_PROOF_JOULES = 10.0
"""Two dies that have drawn less than this agree within a joule by chance."""
_PACKAGE = re.compile(r"package-(\d+)(-die-\d+)?")


@dataclass
class Domain:
    """One counter file and where it wraps, in microjoules."""

    path: Path
    name: str
    wraps_at: int
    last: int = -1
    total: int = 0

    def read(self) -> float:
        """Joules since the first read."""
        now = int((self.path / "energy_uj").read_text())
        if self.last >= 0:
            self.total += now - self.last if now >= self.last else now + self.wraps_at - self.last
        self.last = now
        return self.total / 1e6


@final
class Rapl(AbstractCounter):
    """The CPU packages, with the memory controllers apart."""

    source = "rapl"
    scope = "package"

    def __init__(self, packages: list[Domain], memory: list[Domain], *, watts: float) -> None:
        """Cover `packages` of `watts` design power each."""
        self.packages, self.memory = packages, memory
        self.devices = tuple(hashed(one.name) for one in packages)
        self.poll_every = min(one.wraps_at for one in packages) / 1e6 / (4 * watts)
        self.highest_watts = _IMPLAUSIBLE * watts * len(packages)
        self._error = "RAPL stopped answering"

    def parts(self) -> tuple[float, ...] | None:
        """Joules of each package; None if a file can no longer be read."""
        try:
            return tuple(one.read() for one in self.packages)
        except (OSError, ValueError) as error:
            self._error = f"RAPL stopped answering: {error}"
            return None

    def reason(self) -> str:
        """Why a reading may be missing."""
        return self._error

    def total(self, deltas: Sequence[float]) -> float:
        """Sum of the packages, each mirrored counter once."""
        kept: list[tuple[str, float]] = []
        for domain, joules in zip(self.packages, deltas, strict=True):
            package = domain.name.partition("-die-")[0]
            if not any(_mirrors(package, joules, *other) for other in kept):
                kept.append((package, joules))
        return sum(joules for _, joules in kept)

    def apart(self) -> dict[str, float]:
        """Joules of the memory, where RAPL counts them and they can be read."""
        try:
            return {"dram": sum(one.read() for one in self.memory)} if self.memory else {}
        except (OSError, ValueError):
            return {}


def _mirrors(package: str, joules: float, other: str, others: float) -> bool:
    close = abs(joules - others) <= _MIRROR_JOULES and joules > _PROOF_JOULES
    return package == other and close


def open_rapl(root: Path = ROOT) -> Rapl | str:
    """Return the counter, or the reason why there is none."""
    folders = {folder: _name(folder) for folder in sorted(root.glob("*-rapl:*"))}
    packages = [folder for folder, name in folders.items() if _PACKAGE.fullmatch(name)]
    if not packages:
        return "no energy counter: powercap is not exposed (a virtual machine, or no RAPL)"
    try:
        domains = [_domain(folder, folders[folder]) for folder in packages]
    except PermissionError:
        return "RAPL is readable by root only on this machine"
    except (OSError, ValueError) as error:
        return f"RAPL is there but cannot be read: {error}"
    memory = []
    for folder, name in folders.items():
        if name == "dram":
            try:
                memory.append(_domain(folder, name))
            except (OSError, ValueError):
                memory = []
                break
    return Rapl(domains, memory, watts=max(map(_design_watts, packages)))


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def _domain(folder: Path, name: str) -> Domain:
    domain = Domain(folder, name, int((folder / "max_energy_range_uj").read_text()))
    domain.read()
    return domain


def _design_watts(folder: Path) -> float:
    """Largest power of the long-term constraint: the thermal design power, where it is told."""
    try:
        watts = int((folder / "constraint_0_max_power_uw").read_text()) / 1e6
    except (OSError, ValueError):
        return _ASSUMED_WATTS
    # Some firmware says 0.
    return watts if watts > 0 else _ASSUMED_WATTS
