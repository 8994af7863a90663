"""What a cache belongs to, and `teacher-cache.json`, which says so.

Targets are looked up by the number of a row, so a cache that met another tokenizer or other rows
would teach nonsense without a sign of it. All of that is written down and compared.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import JsonValue, ValidationError

from compresskit.distill.teachers.cache.parse import parse
from compresskit.errors import ModelError, SpecError
from compresskit.record import Stored
from compresskit.spec import spec_digest
from compresskit.store import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.distill.teachers.cache.formats import Format

FILE = "teacher-cache.json"
VERSION = 1


class Source(Stored):
    """Whose words these are, and about what."""

    teacher: str
    """As it was named; another name of the same revision is the same teacher."""
    revision: str
    """As resolved: a commit, or sha256 of the weights."""
    tokenizer: str
    """`tokenizer_digest` of the teacher's tokenizer."""
    data: str
    """`data_digest` of the rows."""
    rows: int
    length: int
    """Tokens of a row."""

    @classmethod
    def of(cls, rows: torch.Tensor, *, teacher: str, revision: str, tokenizer: str) -> Source:
        """The source of a cache over `rows`, int64 `[R, L]`."""
        count, length = rows.shape
        return cls(
            teacher=teacher,
            revision=revision,
            tokenizer=tokenizer,
            data=data_digest(rows),
            rows=count,
            length=length,
        )

    def require(self, other: Source, *, where: Path) -> None:
        """Refuse a cache with the source `self` where `other` is wanted.

        Raises:
            SpecError: they are not the same.
        """
        checks = (
            Check("teacher", f"{self.teacher} at {self.revision}", other.revision, self.revision),
            Check("tokenizer", self.tokenizer[:12], other.tokenizer, self.tokenizer),
            Check("row length", f"rows of {self.length} tokens", other.length, self.length),
            Check("number of rows", f"{self.rows} rows", other.rows, self.rows),
            Check("training text", f"rows with the digest {self.data[:12]}", other.data, self.data),
        )
        for check in checks:
            if check.wanted != check.held:
                raise SpecError(
                    f"{where} is of another {check.what}: it holds {check.holds}, and "
                    f"{str(check.wanted)[:40]} is wanted. Name another folder for the cache, or go "
                    "back to what it was written for."
                )


class Check(NamedTuple):
    """One thing that must be the same."""

    what: str
    holds: str
    wanted: str | int
    held: str | int


class Manifest(Stored):
    """What `teacher-cache.json` holds."""

    version: int = VERSION
    source: Source
    format: str
    """As typed."""
    dtype: str
    """Type that the teacher was computed in."""
    vocabulary: int
    """The teacher's logits a place."""
    seed: int | None
    """Of what is drawn; null where nothing is."""
    rows_per_shard: int
    complete: bool = False
    """False while some rows are not written yet; the numbers below are then null."""
    bytes_per_token: float | None = None
    """Measured: of all shards, headers included, over the places of all rows."""
    shard_bytes: int | None = None
    reconstruction: dict[str, float] | None = None
    """Measured while writing, over all places; the format says what the names mean."""
    teacher_tokens: int | None = None
    """Tokens that the teacher read for the shards that are there; what a stopped run read in vain is
    not among them."""
    seconds: float | None = None
    """What writing these shards took, the teacher's passes included."""

    def parsed(self) -> Format:
        """The format."""
        return parse(self.format, option=FILE)

    def shards(self) -> int:
        """Number of files."""
        return -(-self.source.rows // self.rows_per_shard)

    def span(self, shard: int) -> range:
        """Numbers of the rows in a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.source.rows))

    def digest(self) -> str:
        """What every shard of this cache bears: it covers all that decides a shard's content."""
        shape = self.model_dump(
            mode="json",
            exclude={
                "source": {"teacher"},
                "complete": True,
                "bytes_per_token": True,
                "shard_bytes": True,
                "reconstruction": True,
                "teacher_tokens": True,
                "seconds": True,
            },
        )
        return spec_digest(shape)


def data_digest(rows: torch.Tensor) -> str:
    """SHA-256 over the shape and the tokens of int64 `[R, L]`."""
    digest = hashlib.sha256(repr(tuple(rows.shape)).encode())
    for part in torch.split(rows, 1 << 12):
        digest.update(part.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def save(manifest: Manifest, folder: Path) -> None:
    """Write `teacher-cache.json`, whole or not at all; `RunError` if that fails."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False)
    write_text(folder / FILE, text + "\n")


def load(folder: Path) -> Manifest | None:
    """Read `teacher-cache.json`; None where there is none.

    Raises:
        ModelError: it cannot be read, or a newer version wrote it.
    """
    path = folder / FILE
    try:
        document: dict[str, JsonValue] = _object(path)
        version = document.get("version")
        if isinstance(version, int) and version > VERSION:
            raise ModelError(
                f"{path}: written by a newer compresskit (version {version}, this one reads "
                f"{VERSION}). Update compresskit, or name another folder."
            )
        manifest = Manifest.model_validate(document)
        manifest.parsed()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError, SpecError, LookupError) as error:
        raise ModelError(
            f"{path}: not the description of a teacher cache ({str(error).splitlines()[0]}). Delete "
            "the folder and write the cache again."
        ) from None
    return manifest


def _object(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    return document
