"""The loss of every step, a JSON line each, as far as the checkpoint that goes with it.

Lines are written as steps end, so that a training can be watched; they are made to last (`keep`) before
a checkpoint is. After a crash, the lines that no checkpoint covers are dropped: those steps are taken
again.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Self

from compresskit.distill.product import CURVE
from compresskit.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from compresskit.distill.progress import Stride


class Curve:
    """`curve.jsonl` in a folder, opened to go on behind step `done`."""

    def __init__(self, folder: Path, done: int) -> None:
        """Cut off what lies behind step `done`.

        Raises:
            RunError: the lines up to it are not all there, or the file cannot be written.
        """
        self.path = folder / CURVE
        kept = [line for line in _lines(self.path) if _step(line) is not None][:done]
        if len(kept) < done or any(_step(line) != place + 1 for place, line in enumerate(kept)):
            raise RunError(
                f"{self.path}: it does not hold the {done} steps of the checkpoint. Put it back, or "
                "delete the folder and start again."
            )
        partial = self.path.with_suffix(".partial")
        with _written(self.path):
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            partial.replace(self.path)
            self._file: IO[str] = self.path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Self:
        """Open already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the file; what it could not take has been said."""
        with suppress(OSError):
            self._file.close()

    def add(self, stride: Stride) -> None:
        """One more step.

        Raises:
            RunError: it cannot be written.
        """
        with _written(self.path):
            self._file.write(json.dumps(stride._asdict(), allow_nan=False) + "\n")

    def keep(self) -> None:
        """See that all lines outlive a crash.

        Raises:
            RunError: they do not.
        """
        with _written(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise RunError(
            f"{path}: the loss of a step could not be written ({why}). The checkpoint there, if any, is "
            "kept: make room, then give the same command with --resume."
        ) from error


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step(line: str) -> int | None:
    """The step of a line; None for one that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
