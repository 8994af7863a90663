"""Read the header of a GGUF file, enough to know that the file is whole before minutes are spent.

    "GGUF" | version u32 | tensors u64 | pairs u64
    pairs    key, type u32, value         strings are u64 length + UTF-8, arrays type + u64 count
    tensors  name, dims u32, shape u64[dims], type u32, offset u64
    padding to `general.alignment`, then the tensors' blocks at their offsets

The library `gguf` has a reader, but it unpacks every token of the vocabulary (seconds to half a
minute) and answers a truncated file with an error from numpy. Block sizes are taken from it.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskit.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MOST_DIMENSIONS = 8
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself."""

    architecture: str
    name: str
    licence: str | None
    parameters: int
    complete_bytes: int
    """Length of the file if nothing is missing."""
    splits: int
    """Number of files the model is spread over."""


class _Cursor:
    """A position in the mapped file; every read is bounds-checked by `struct`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> int | float | bool:
        """Read one little-endian number."""
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value  # type: ignore[no-any-return]

    def integer(self, code: str = "Q") -> int:
        """Read one unsigned integer."""
        return int(self.scalar(code))

    def skip(self, count: int) -> None:
        """Step over `count` bytes, which must exist."""
        self.at += count
        if self.at > len(self.data):
            raise struct.error("past the end")

    def text(self) -> str:
        """Read a string."""
        start = self.at + 8
        self.skip(8 + self.integer_at(self.at))
        return self.data[start : self.at].decode("utf-8", errors="replace")

    def integer_at(self, position: int) -> int:
        """Look at a u64 without moving."""
        return int(struct.unpack_from("<Q", self.data, position)[0])

    def value(self, kind: int) -> str | int | float | bool | None:
        """Read a value; arrays are stepped over and give `None`."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise struct.error(f"unknown value type {kind}")
        inner, count = self.integer("I"), self.integer()
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            return None
        for _ in range(count):
            if inner == _STRING:
                self.skip(8 + self.integer_at(self.at))
            else:
                self.value(inner)
        return None


def read(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        ModelError: not a GGUF file, of a version or block type nobody knows here, or truncated.
    """
    try:
        return _checked(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _checked(path: Path) -> GgufHeader:
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise ModelError(
                f"{path} is not a GGUF file: it begins with {magic!r} instead of {_MAGIC!r}. "
                "Download it again."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(path, _Cursor(data))
            except (struct.error, OverflowError, ValueError, RecursionError) as error:
                raise ModelError(
                    f"{path} is truncated or corrupt: its header cannot be read ({error}). "
                    "Download it again."
                ) from error
    if size < header.complete_bytes:
        raise ModelError(
            f"{path} is truncated: {size} of {header.complete_bytes} bytes. Download it again."
        )
    return header


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    cursor.skip(len(_MAGIC))
    version = cursor.integer("I")
    if version not in _VERSIONS:
        raise ModelError(f"{path} has GGUF version {version}; known are {_VERSIONS}.")
    tensors, pairs = cursor.integer(), cursor.integer()
    facts: dict[str, str | int | float | bool | None] = {}
    for _ in range(pairs):
        key = cursor.text()
        facts[key] = cursor.value(cursor.integer("I"))
    parameters, end = _tensors(path, cursor, tensors)
    alignment = int(facts.get("general.alignment") or _ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment  # rounded up
    licence = facts.get("general.license")
    return GgufHeader(
        architecture=str(facts.get("general.architecture") or "unknown"),
        name=str(facts.get("general.name") or path.stem),
        licence=None if licence is None else str(licence),
        parameters=parameters,
        complete_bytes=start + end,
        splits=int(facts.get("split.count") or 1),
    )


def _tensors(path: Path, cursor: _Cursor, count: int) -> tuple[int, int]:
    """Step over the tensor list; returns (parameters, end of the last tensor's blocks)."""
    from gguf.constants import GGML_QUANT_SIZES

    blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    parameters = end = 0
    for _ in range(count):
        name = cursor.text()
        dimensions = cursor.integer("I")
        if dimensions > _MOST_DIMENSIONS:
            raise struct.error(f"tensor {name!r} has {dimensions} dimensions")
        elements = math.prod(cursor.integer() for _ in range(dimensions))
        kind, offset = cursor.integer("I"), cursor.integer()
        if kind not in blocks:
            raise ModelError(f"{path}: tensor {name!r} has the unknown block type {kind}.")
        block, block_bytes = blocks[kind]
        parameters += elements
        end = max(end, offset + -(-elements // block) * block_bytes)
    return parameters, end
