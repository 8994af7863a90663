"""Time taken by others: how long this process was ready to run and had no CPU.

Linux counts it exactly, per thread, in `/proc/<pid>/task/<tid>/schedstat` (second number,
nanoseconds on a run queue). A sleep in our own code is not waiting, so a slow program and a busy
machine can be told apart. Only the thread that decodes is watched.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


@dataclass
class Waiting:
    """Seconds of a window that were spent waiting for a CPU; None where nobody counts them."""

    seconds: float | None = None


@contextmanager
def watch() -> Iterator[Waiting]:
    """Count the waiting of the enclosed block; reads two small files, outside the timed window."""
    waiting, before = Waiting(), queued()
    yield waiting
    after = queued()
    if before is not None and after is not None:
        waiting.seconds = after - before


def queued() -> float | None:
    """Seconds this thread has spent on a run queue since it began."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
