"""Energy of the CPU packages from RAPL, through Linux' powercap files.

Only `package-N` domains are summed: `core` and `uncore` are parts of them, `psys` contains them,
`dram` is apart. The counter wraps at `max_energy_range_uj`; `joules` unwraps between reads, so it
must be read at least once per wrap (several minutes on server parts). Reading has needed root
since Linux 5.10 (CVE-2020-8694); compresskit never asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("/sys/class/powercap")


@dataclass
class Domain:
    """One package: its counter file and where it wraps, in microjoules."""

    path: Path
    wraps_at: int
    last: int = -1
    total: int = 0

    def read(self) -> int:
        """Microjoules since the first read."""
        now = int((self.path / "energy_uj").read_text())
        if self.last >= 0:
            self.total += now - self.last if now >= self.last else now + self.wraps_at - self.last
        self.last = now
        return self.total


@dataclass
class Rapl:
    """Sum over the CPU packages."""

    domains: list[Domain]
    source: str = "rapl"
    scope: str = "package"
    _error: str = field(default="RAPL stopped answering")

    def joules(self) -> float | None:
        """Cumulated energy in joules; None if a file can no longer be read."""
        try:
            return sum(domain.read() for domain in self.domains) / 1e6
        except (OSError, ValueError) as error:
            self._error = f"RAPL stopped answering: {error}"
            return None

    def reason(self) -> str:
        """Why a reading may be missing."""
        return self._error


def open_rapl(root: Path = ROOT) -> Rapl | str:
    """Return the counter, or the reason why there is none."""
    packages = [
        folder
        for folder in sorted(root.glob("intel-rapl:*"))
        if (folder / "name").exists()
        and (folder / "name").read_text().strip().startswith("package-")
    ]
    if not packages:
        return "no energy counter: powercap is not exposed (a virtual machine, or no RAPL)"
    try:
        domains = [Domain(p, int((p / "max_energy_range_uj").read_text())) for p in packages]
        for domain in domains:
            domain.read()
    except PermissionError:
        return "RAPL is readable by root only on this machine"
    except (OSError, ValueError) as error:
        return f"RAPL is there but cannot be read: {error}"
    return Rapl(domains)
