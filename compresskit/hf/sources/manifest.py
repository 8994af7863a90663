"""The note inside every finished cache entry: where it came from and what must be in it.

An entry is used only if the manifest is there and every file has the noted length. A file whose
modification time moved is hashed again. Folders that carry a manifest keep their kind of baseline
when they are copied to another machine and opened as a local folder.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from compresskit.hf.sources.digest import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME = "compresskit-manifest.json"
FORMAT = 1


def read(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder; `None` if there is none or it cannot be understood."""
    try:
        note = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    well_formed = (
        isinstance(note, dict)
        and note.get("format") == FORMAT
        and isinstance(note.get("facts"), dict)
        and isinstance(note.get("files"), dict)
        and all(
            isinstance(file, dict) and {"bytes", "mtime_ns", "sha256"} <= file.keys()
            for file in note["files"].values()
        )
    )
    return note if well_formed else None


def flaw(folder: Path, facts: Mapping[str, str]) -> str | None:
    """Say what is wrong with a cache entry; `None` if it can be used."""
    note = read(folder)
    if note is None:
        return f"{NAME} is missing or unreadable"
    if note["facts"] != dict(facts):
        return f"{NAME} describes something else"
    for name, expected in note["files"].items():
        try:
            state = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if state.st_size != expected["bytes"]:
            return f"{name} has {state.st_size} bytes instead of {expected['bytes']}"
        touched = state.st_mtime_ns != expected["mtime_ns"]
        if touched and sha256(folder / name) != expected["sha256"]:
            return f"{name} was changed"
    return None


def seal(folder: Path, facts: Mapping[str, str]) -> None:
    """Write the manifest of a finished folder and push everything to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o644)  # save_pretrained leaves weights that only their owner can read
        sync(path)
        state = path.stat()
        files[path.relative_to(folder).as_posix()] = {
            "bytes": state.st_size,
            "mtime_ns": state.st_mtime_ns,
            "sha256": sha256(path),
        }
    note = {"format": FORMAT, "facts": dict(facts), "files": files}
    (folder / NAME).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    sync(folder / NAME)
    sync(folder)


def sync(path: Path) -> None:
    """Push a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
