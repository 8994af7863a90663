"""A peer: a result that another tool measured, with what that tool's file says about it.

Stored as `<tool>-<hash of the file>-<number>.peer.json` with a checksum, like a record. A peer is
not a record: there are no samples to judge, the conditions are what the other tool chose, and the
text it ran on is unknown. So it stands in a table of its own and is never divided by, ranked with
or judged beside our rows.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import from_json

from compresskit.errors import RecordError, UsageError
from compresskit.metrics import METRICS
from compresskit.record import Reading, Stored
from compresskit.store import checksum, write_text
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

FORMAT: Literal["compresskit.peer/1"] = "compresskit.peer/1"
SUFFIX = ".peer.json"

OWN: Mapping[str, tuple[Unit, str]] = MappingProxyType(
    {
        "ttft_p99_s": (Unit.SECOND, "99th percentile of the time to the first token."),
        "tpot_p99_s": (Unit.SECOND, "99th percentile of the time per output token."),
        "itl_p99_s": (Unit.SECOND, "99th percentile of the gaps between chunks."),
        "total_tokens_per_s": (
            Unit.TOKEN_PER_SECOND,
            "Prompt and output tokens of all requests over the time they took together.",
        ),
        "requests_per_s": (Unit.COUNT, "Finished requests over the time they took together."),
    }
)
"""Numbers that other tools publish and our metrics do not have, with unit and meaning."""

_RENAMED = MappingProxyType(
    {"acceptance_rate": "draft_acceptance_rate", "acceptance_length": "mean_acceptance_length"}
)
"""Names in files of earlier versions; the numbers are vLLM's and mean what they meant."""


def unit_of(name: str) -> Unit:
    """Unit of a metric that a peer may hold."""
    return METRICS[name].unit if name in METRICS else OWN[name][0]


class File(Stored):
    """Where a peer was read from."""

    name: str
    sha256: str
    entry: int
    """Number of the result within the file, from 0."""


class Stated(Stored):
    """A number under the tool's own name and in its own unit."""

    value: float
    stderr: float | None = None


class Peer(Stored):
    """One result of another tool."""

    format: Literal["compresskit.peer/1"] = FORMAT
    tool: str
    """llama-bench, vllm, lm-eval or mlperf."""
    label: str
    file: File
    measured_at: str | None = None
    model: str | None = None
    device: str | None = None
    batch: int | None = None
    """Sequences at a time: the batch, or the largest number of concurrent requests."""
    prompt_tokens: float | None = None
    """Per request; the mean where requests differ."""
    new_tokens: float | None = None
    """Per request; the mean where requests differ."""
    verdict: str | None = None
    """What the tool said about its own result."""
    metrics: dict[str, Reading] = Field(default_factory=dict)
    """By our names, where the formulae agree."""
    stated: dict[str, Stated] = Field(default_factory=dict)
    """By the tool's names."""
    context: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further facts from the file."""
    given: tuple[str, ...] = ()
    """Fields that the person who imported the file added."""


def describe(peers: Iterable[Peer], **given: str | None) -> list[Peer]:
    """Return `peers` with fields that a person added (label, model, device), marked as such."""
    added = {name: value for name, value in given.items() if value}
    return [
        one.model_copy(update={**added, "given": tuple(sorted({*one.given, *added}))})
        for one in peers
    ]


def dumps(peer: Peer) -> str:
    """JSON text of `peer` with its checksum."""
    document = peer.model_dump(mode="json")
    document["checksum"] = checksum(document)
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def save(peers: Iterable[Peer], folder: Path) -> list[Path]:
    """Write each peer atomically; the same file imported again gives the same names."""
    written = []
    for peer in peers:
        name = f"{peer.tool}-{peer.file.sha256[:12]}-{peer.file.entry}{SUFFIX}"
        write_text(folder / name, dumps(peer))
        written.append(folder / name)
    return written


def load(path: Path) -> Peer:
    """Read one stored peer; raise `RecordError` if it cannot be read or was edited."""
    again = "Delete it and import again."
    try:
        text = path.read_bytes()
        document: Any = from_json(text, allow_inf_nan=False)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise RecordError(f"{path}: not an imported result ({FORMAT}).")
        if document.get("checksum") != checksum(document):
            raise RecordError(f"{path}: the checksum does not match: the file was edited. {again}")
        return _named_as_today(Peer.model_validate_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"{path}: {place}: {first['msg']}. {again}") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not a readable imported result ({error}). {again}") from None


def _named_as_today(peer: Peer) -> Peer:
    """Give metrics the names that they have now."""
    metrics = {_RENAMED.get(name, name): reading for name, reading in peer.metrics.items()}
    return peer.model_copy(update={"metrics": metrics})


def find(paths: Sequence[Path]) -> tuple[list[Peer], list[str]]:
    """Read all peers among `paths` and in folders below them; what cannot be read is a warning.

    Raises:
        UsageError: a path does not exist.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            files |= dict.fromkeys(sorted(path.rglob(f"*{SUFFIX}")))
        elif path.name.endswith(SUFFIX):
            files[path] = None
        elif not path.exists():
            raise UsageError(f"{path}: no such file or folder.")
    found, warnings = [], []
    for path in files:
        try:
            found.append(load(path))
        except RecordError as error:
            warnings.append(f"left out: {error}")
    found.sort(key=lambda one: (one.tool, one.file.name, one.file.sha256, one.file.entry))
    return found, warnings
