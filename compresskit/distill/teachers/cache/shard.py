"""Some rows of a cache in one safetensors file: whole or not there.

A shard is written beside its place and renamed when it is on the disk, so whatever ends the writer
leaves whole shards only. Each one bears the digest of its cache and the SHA-256 of its own tensors:
the first refuses a file from elsewhere, the second a disk or copy that changed a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from compresskit.errors import ModelError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Told:
    """What a shard says of itself."""

    cache: str
    """Digest of the cache that it belongs to."""
    first: int
    """Its first row."""
    sha256: str
    """Of its tensors."""
    errors: Mapping[str, float]
    """Sums over its places of what the format calls errors."""
    seconds: float
    """What it took to make."""


def path_of(folder: Path, index: int) -> Path:
    """Where shard `index` lies."""
    return folder / f"rows-{index:05d}.safetensors"


_NAME = re.compile(r"rows-\d{5,}\.safetensors")


def listed(folder: Path) -> list[Path]:
    """Every file in `folder` that is called like a shard."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def content_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, tensors: Mapping[str, torch.Tensor], told: Told) -> None:
    """Write a shard, flushed to the disk before it gets its name.

    Raises:
        RunError: the disk is full or cannot be written; shards that are there stay there.
    """
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(serialise(content, metadata={"compresskit": json.dumps(asdict(told))}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. The rows before it are kept: free space "
            "and run the same command again, or name a folder on a larger disk."
        ) from None


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into a `ModelError`."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: missing, cut short or no shard of a teacher cache ({error}). {_REPAIR}"
        ) from None


_REPAIR = "Delete this file and write the cache again: the other shards are kept."


def open_mapped(path: Path, *, cache: str, first: int) -> tuple[Any, Told]:
    """Open a shard without reading its tensors; a file shorter than its header says is refused.

    Raises:
        ModelError: it is damaged, or belongs to another cache or to another place.
    """
    with damage_told(path):
        file: Any = safe_open(path, framework="pt")
        told = Told(**json.loads((file.metadata() or {})["compresskit"]))
    if (told.cache, told.first) != (cache, first):
        raise ModelError(
            f"{path}: a shard of another cache, or of other rows of this one (it says {told.cache}, "
            f"row {told.first}; {cache}, row {first} belongs here). {_REPAIR}"
        )
    return file, told


def verify(path: Path, file: Any, told: Told) -> None:
    """Read the whole of an open shard and compare its content with what it says.

    Raises:
        ModelError: a byte is not what was written.
    """
    with damage_told(path):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    if content_sha256(tensors) != told.sha256:
        raise ModelError(f"{path}: its content is not what was written. {_REPAIR}")
