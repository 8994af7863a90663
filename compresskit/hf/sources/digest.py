"""Content digests: what pins a model that has no commit.

A digest of gigabytes takes seconds, so it is remembered in the cache under the file's path, size
and times. The memory is only a shortcut: if it cannot be written, the file is hashed again.

    one weights file    sha256 of the file, what `sha256sum model.safetensors` prints
    several shards      sha256 of the lines "<sha256>  <file name>", sorted by file name
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import TYPE_CHECKING

from compresskit.hf.sources.model import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_CHUNK = 4 << 20


def sha256(path: Path, progress: Progress = silent) -> str:
    """Hash a file piece by piece; returns 64 hex digits."""
    total = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(f"checking {path.name}", file.tell(), total)
    return digest.hexdigest()


def remembered_sha256(path: Path, cache: Path, progress: Progress = silent) -> str:
    """Hash a file, or recall the hash if path, size and times are those of last time."""
    state = path.stat()
    key = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}"
    memo = cache / "digests" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(memo.read_text(encoding="utf-8"))
        if isinstance(note, dict) and note.get("key") == key and len(note.get("sha256", "")) == 64:
            return str(note["sha256"])
    value = sha256(path, progress)
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        draft = memo.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"key": key, "sha256": value}), encoding="utf-8")
        draft.replace(memo)
    return value


def revision(sha: str) -> str:
    """Shorten 64 hex digits to the revision that records carry.

    >>> revision("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    'sha256:b179c9523d0e6a0f'
    """
    return f"sha256:{sha[:16]}"


def weights_revision(files: Sequence[Path], cache: Path, progress: Progress = silent) -> str:
    """Pin a model by its weights files."""
    shas = {path.name: remembered_sha256(path, cache, progress) for path in files}
    if len(shas) == 1:
        return revision(next(iter(shas.values())))
    lines = "".join(f"{shas[name]}  {name}\n" for name in sorted(shas))
    return revision(hashlib.sha256(lines.encode()).hexdigest())
