"""Records on disk: written whole or not at all, and refused when they are not what was written.

Each file carries a checksum over the rest of its content. It guards against accidents and against
numbers mended by hand, not against forgers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compresskit.errors import RecordError, RunError
from compresskit.migrate import upgrade
from compresskit.record import SCHEMA, Record
from compresskit.spec import spec_digest


def dumps(record: Record) -> str:
    """JSON text of `record` with its checksum; no NaN, no rounding."""
    document = record.model_dump(mode="json")
    document["checksum"] = checksum(document)
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def checksum(document: dict[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of everything but the checksum itself."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(path: Path) -> Record:
    """Read one record; raise `RecordError` if it cannot be read, is from the future or was edited."""
    try:
        document: Any = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant
        )
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RecordError(
            f"{path}: not a readable record ({error}). Delete it and run again."
        ) from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise RecordError(f"{path}: not a compresskit record (no schema_version).")
    version = document["schema_version"]
    if type(version) is not int or not 1 <= version <= SCHEMA:
        raise RecordError(
            f"{path}: schema {version!r}; this version reads 1 to {SCHEMA}. Update compresskit."
        )
    stored, named = document.get("spec"), document.get("digest")
    if isinstance(stored, dict) and spec_digest(stored) != named:
        raise RecordError(
            f"{path}: digest {named} does not belong to the stored spec ({spec_digest(stored)}): "
            "the file was edited. Delete it and run again."
        )
    if document.get("checksum") != checksum(document):
        raise RecordError(
            f"{path}: the checksum does not match: the file was edited. Delete it and run again."
        )
    try:
        record = Record.model_validate_json(json.dumps(upgrade(document)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"{path}: {place}: {first['msg']}. Delete it and run again.") from None
    # A field that is new since the record was written changes the digest of equal specs: joins go
    # by the digest of the spec as it is understood now.
    return record.model_copy(update={"digest": record.spec.digest()})


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


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
