"""Which pages of this process are in memory, and whose they are (Linux).

    /proc/self/smaps     one entry a mapping    anonymous | pages of files with code | of other files
    /proc/self/pagemap   one word a page        which bytes of a tensor are really in memory
    mallinfo2            glibc's allocator      what was freed and is kept for the next allocation

Weights loaded from safetensors are a mapped file: they become resident when they are touched, and
stay so, as long as the file is mapped, even when no tensor uses them any more. So a tensor's size
says little about resident memory; its pages do. What a system does not tell is None.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SMAPS = Path("/proc/self/smaps")
PAGEMAP = Path("/proc/self/pagemap")

PAGE = mmap.PAGESIZE
_PRESENT, _OF_A_FILE = np.uint64(63), np.uint64(61)
"""Bits of a word in pagemap (Documentation/admin-guide/mm/pagemap.rst)."""


class Resident(NamedTuple):
    """Resident bytes of a process by what backs the pages."""

    anonymous: int
    """The heap, stacks, other allocations, and pages of files that were written to."""
    libraries: int
    """Pages of mapped files that hold code."""
    files: int
    """Pages of all other mapped files: model files, above all."""
    heap_holes: int
    """Part of the heap's address range that is not in memory."""

    @property
    def total(self) -> int:
        """What is called resident memory."""
        return self.anonymous + self.libraries + self.files


def resident(smaps: Path = SMAPS) -> Resident | None:
    """Read what is resident now; takes some ten milliseconds."""
    try:
        mappings = list(_mappings(smaps))
    except OSError:
        return None
    with_code = {mapping.path for mapping in mappings if mapping.code}
    libraries = files = anonymous = holes = 0
    for mapping in mappings:
        anonymous += mapping.anonymous
        of_file = mapping.resident - mapping.anonymous
        if mapping.path in with_code:
            libraries += of_file
        else:
            files += of_file
        if mapping.path == "[heap]":
            holes += mapping.size - mapping.resident
    return Resident(anonymous, libraries, files, holes)


class _Mapping(NamedTuple):
    path: str
    code: bool
    size: int
    resident: int
    anonymous: int


def _mappings(smaps: Path) -> Iterator[_Mapping]:
    """One item per mapping: a line `from-to perms offset device inode path`, then its counters."""
    path, code, counters = "", False, dict[str, int]()
    with smaps.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, rest = line.partition(" ")
            if name.endswith(":"):
                if name in _COUNTERS:
                    counters[name] = int(rest.split()[0]) * 1024
                continue
            if counters:
                yield _Mapping(path, code, *(counters.get(one, 0) for one in _COUNTERS))
            fields = rest.split(maxsplit=4)
            path = fields[4].strip() if len(fields) > 4 else ""
            code, counters = "x" in fields[0], {}
    if counters:
        yield _Mapping(path, code, *(counters.get(one, 0) for one in _COUNTERS))


_COUNTERS = ("Size:", "Rss:", "Anonymous:")


class Pages(NamedTuple):
    """Resident bytes of some address ranges, in whole pages."""

    resident: int
    of_files: int
    """The part that is backed by a file."""


def pages(ranges: Iterable[tuple[int, int]], pagemap: Path = PAGEMAP) -> Pages | None:
    """Count the resident pages of `ranges` (address, bytes), each page once."""
    present = of_files = 0
    try:
        with pagemap.open("rb", buffering=0) as words:
            for first, last in _merged(ranges):
                words.seek(first * 8)
                page = np.frombuffer(words.read((last - first) * 8), dtype=np.uint64)
                here = page[(page >> _PRESENT) & np.uint64(1) == 1]
                present += here.size
                of_files += int(((here >> _OF_A_FILE) & np.uint64(1)).sum())
    except OSError:
        return None
    return Pages(present * PAGE, of_files * PAGE)


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Page numbers [first, last) that cover `ranges`, overlaps joined."""
    spans = sorted((start // PAGE, -(-(start + size) // PAGE)) for start, size in ranges if size)
    first = last = -1
    for low, high in spans:
        if low > last:
            if last > first:
                yield first, last
            first, last = low, high
        else:
            last = max(last, high)
    if last > first:
        yield first, last


class _MallInfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`, since version 2.33."""

    _fields_: ClassVar = [
        (field, ctypes.c_size_t)
        for field in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def freed_in_allocator(now: Resident) -> int | None:
    """Resident bytes that the C allocator keeps for later: freed, not given back to the system.

    Free blocks less the holes of the heap, which are free but not in memory. Blocks of other
    arenas (threads) count as resident.
    """
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if ask is None:
        return None
    ask.restype = _MallInfo2
    return int(ask().fordblks) - now.heap_holes
