"""Read the records of one side. What cannot be read is an error: a gate must not pass on a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit import store
from compresskit.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.record import Record


def load(path: Path) -> dict[Path, Record]:
    """Return the records of a file, or of a folder and everything below it.

    Raises:
        UsageError: the path does not exist or holds no record.
        RecordError: a record cannot be read.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder.")
    with store.many():
        found = {file: store.load(file) for file in store.files(path)}
    if not found:
        raise UsageError(f"no record in {path}. Make some with: compresskit run --out {path}")
    return found
