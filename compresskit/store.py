"""Records on disk: written whole or not at all, and refused when they are not what was written.

Each file carries a checksum over the rest of its content. It guards against accidents and against
numbers mended by hand, not against forgers. Reading is strict: no NaN, no Infinity, no number too
large for a float, no endless nesting, no time that runs backwards.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import tempfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import from_json

from compresskit.errors import RecordError, RunError
from compresskit.migrate import upgrade
from compresskit.record import SCHEMA, Record
from compresskit.spec import spec_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.record import Passes, Sample


_NOT_RECORDS = frozenset(
    {"machine.json", "interleaved.json", "interleaved-2-threads.json", "meters.json", "curve.json",
     "attention-overhead.json", "speculation-overhead.json", "distill-seeds.json",
     "distill-memory.json", "distill-throughput.json", "distillation.json"}
)  # fmt: skip
"""What lies beside records: the machine, cards of students, documents of benchmarks and of `curve`."""
_AGAIN = "Delete it and run again."
LARGEST = 1e24
"""No time, size or rate that a record holds comes near it; sums and products of them stay finite."""
SHORTEST = 1e-12
"""Seconds; no clock resolves less, and no rate over more than this overflows."""
# In canonical JSON a float from 1e16 on has an exponent with a sign. Two plain searches are five
# times as fast as one with an alternative.
_PERHAPS_LARGE = (re.compile(r"e\+(?:2[4-9]|[3-9][0-9]|[0-9]{3})"), re.compile(r"[:\[,-][0-9]{25}"))


def dumps(record: Record) -> str:
    """JSON text of `record` with its checksum; no NaN, no rounding."""
    document = record.model_dump(mode="json")
    document["checksum"] = checksum(document)
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def checksum(document: dict[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of everything but the checksum itself."""
    return _hashed(_canonical(document))


def _canonical(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(path: Path) -> Record:
    """Read one record; raise `RecordError` if it cannot be read, is from the future or was edited."""
    try:
        text = path.read_bytes()
        document: Any = from_json(text, allow_inf_nan=False)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not a readable record ({error}). {_AGAIN}") from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise RecordError(f"{path}: not a compresskit record (no schema_version).")
    version = document["schema_version"]
    if type(version) is not int or not 1 <= version <= SCHEMA:
        raise RecordError(
            f"{path}: schema {version!r}; this version reads 1 to {SCHEMA}. Update compresskit."
        )
    try:
        _untouched(document)
        # JSON mode keeps the spec strict ("0.5" is no number) while lists stand for tuples, so a
        # record of today is read from its own bytes.
        record = Record.model_validate_json(
            text if version == SCHEMA else json.dumps(upgrade(document))
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"{path}: {place}: {first['msg']}. {_AGAIN}") from None
    except RecordError as error:
        raise RecordError(f"{path}: {error} {_AGAIN}") from None
    for fault in _impossible(record):
        raise RecordError(f"{path}: {fault}. {_AGAIN}")
    return _named_as_today(record, document["spec"])


def files(path: Path) -> list[Path]:
    """Files that should be records: `path` itself, or what lies in the folder and below, in order.

    Machine files, raw benchmarks, audits and imported results of other tools live beside records.
    """
    if not path.is_dir():
        return [path]
    return [
        child
        for child in sorted(path.rglob("*.json"))
        if child.name not in _NOT_RECORDS
        and not child.name.startswith(".")
        and not child.name.endswith((".peer.json", ".audit.json"))
    ]


def _named_as_today(record: Record, stored: dict[str, Any]) -> Record:
    """Replace the digests that a record names by those of its specs as they are understood now.

    A field that is new since the record was written changes the digest of equal specs.
    """
    digest = record.spec.digest()
    if record.digest == digest:
        return record
    changes: dict[str, Any] = {"digest": digest}
    fidelity = None if record.quality is None else record.quality.fidelity
    if record.quality is not None and fidelity is not None:
        for dense in record.spec.best_dense():
            engine = {**stored.get("engine", {}), "mode": dense.engine.mode}
            if spec_digest({**stored, "stack": [], "engine": engine}) == fidelity.baseline_digest:
                renamed = fidelity.model_copy(update={"baseline_digest": dense.digest()})
                changes["quality"] = record.quality.model_copy(update={"fidelity": renamed})
    return record.model_copy(update=changes)


@contextmanager
def many() -> Iterator[None]:
    """Pause the garbage collector while many records are read.

    A record holds no cycles, yet the collector looks through all of them again and again: for two
    thousand records that takes longer than reading them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _untouched(document: dict[str, Any]) -> None:
    """Compare the two hashes that a record carries with its content; raise `RecordError`."""
    spec, named = document.get("spec"), document.get("digest")
    try:
        belongs = spec_digest(spec) if isinstance(spec, dict) else named
        text = _canonical(document)
    except ValueError:
        # A literal such as 1e999 is read as infinity, which JSON cannot say.
        raise RecordError("a number is too large.") from None
    if belongs != named:
        raise RecordError(
            f"digest {named} does not belong to the stored spec ({belongs}): the file was edited."
        )
    if document.get("checksum") != _hashed(text):
        raise RecordError("the checksum does not match: the file was edited.")
    if any(form.search(text) for form in _PERHAPS_LARGE) and _largest(document) > LARGEST:
        raise RecordError(f"a number is larger than {LARGEST:.0e}, which nothing here can measure.")


def _largest(value: Any) -> float:
    """Largest magnitude of a number anywhere in a JSON document."""
    if isinstance(value, (int, float)):
        return abs(value)
    parts = value.values() if isinstance(value, dict) else value
    return max(map(_largest, parts), default=0) if isinstance(value, (dict, list)) else 0


def _impossible(record: Record) -> Iterator[str]:
    """Name times that no clock can have given: negative, running backwards, or endlessly short."""
    if record.setup is not None:
        for name in ("load_seconds", "apply_seconds", "compile_seconds"):
            if (getattr(record.setup, name) or 0.0) < 0:
                yield f"setup.{name} is negative"
        cost = record.setup.training
        if cost is not None and min(cost.seconds, cost.steps, cost.tokens, cost.teacher_tokens) < 0:
            yield "setup.training holds a negative cost"
    for index, block in enumerate(record.blocks):
        for sample in _samples(block.passes):
            marks = [0.0, *(arrival.seconds for arrival in sample.arrivals)]
            if any(after < before for before, after in pairwise(marks)):
                yield f"blocks.{index}: a chunk arrived before the one in front of it"
            if any(0 < mark < SHORTEST for mark in marks):
                yield f"blocks.{index}: a chunk arrived after less than {SHORTEST:g} s"
        energy = block.passes.energy
        windows = () if energy is None else (*energy.prefill, *energy.generate)
        if any((window.window_seconds or 0.0) < 0 for window in windows):
            yield f"blocks.{index}: an energy window is negative"


def _samples(passes: Passes) -> Iterator[Sample]:
    for probe in (passes.latency, *(passes.throughput or ())):
        if probe is not None:
            yield from probe.warmups
            yield from probe.samples


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` is either the old file or the whole new one; raise `RunError` if it cannot."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            dir=path.parent,
            prefix=f".{path.name}.",
            suffix=".partial",
            delete=False,
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another --out."
        ) from None


def save(record: Record, folder: Path) -> Path:
    """Write `record` atomically as `<folder>/<digest>.json` and return the path."""
    path = folder / f"{record.digest}.json"
    write_text(path, dumps(record))
    return path
