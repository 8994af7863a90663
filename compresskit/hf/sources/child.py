"""Run a slow helper process and show how much it has written.

Two steps happen outside this process: pip's download (pip offers no stable Python interface) and
the unpacking of a GGUF file (its memory must not be ours). Neither reports progress in a form
made for programs, but both fill a folder, and a folder's bytes can be counted.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compresskit.hf.sources.model import Progress

_POLL_SECONDS = 0.2
_TAIL_LINES = 6
_FULL_DISK = ("Errno 28", "os error 28", "No space left on device", "Disk quota exceeded")


class ChildFailed(Exception):
    """The helper process failed; the text is the end of what it wrote."""


def run_watched(
    command: Sequence[str],
    *,
    folder: Path,
    label: str,
    total: int,
    progress: Progress,
    env: Mapping[str, str],
) -> None:
    """Run `command` to its end, reporting the bytes in `folder` as progress.

    Args:
        command: program and arguments; no shell.
        folder: where the process writes, temporary files included.
        label: name of the step.
        total: bytes that `folder` is expected to hold in the end.
        progress: receives label, bytes so far and `total`.
        env: environment variables to set on top of ours.

    Raises:
        ChildFailed: the exit status was not 0.
        OSError: with errno ENOSPC, if the process failed for want of disk space.
    """
    # Temporary files count as progress and belong on the disk whose space was checked. The log has
    # no name (TemporaryFile), so it does not count and vanishes with us.
    with (
        tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile(dir=folder) as log,
    ):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env, "TMPDIR": scratch},
        )
        try:
            status = _wait(process, folder, label, total, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        text = log.read().decode("utf-8", errors="replace")
    if status != 0:
        if any(mark in text for mark in _FULL_DISK):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise ChildFailed(_reason(status, text))


def _wait(
    process: subprocess.Popen[bytes], folder: Path, label: str, total: int, progress: Progress
) -> int:
    while True:
        progress(label, min(_bytes_in(folder), total), total)
        try:
            return process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _bytes_in(folder: Path) -> int:
    held = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                held += Path(parent, name).stat().st_size
            except FileNotFoundError:  # temporary files come and go
                continue
    return held


def _reason(status: int, text: str) -> str:
    if status == -signal.SIGKILL:
        return "the process was killed (SIGKILL); most often the machine ran out of memory"
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    # Progress bars overwrite their line with \r; what counts is the last state of each line.
    lines = [line.rsplit("\r", 1)[-1].strip() for line in text.splitlines()]
    return "\n".join([line for line in lines if line][-_TAIL_LINES:]) or f"exit status {status}"
