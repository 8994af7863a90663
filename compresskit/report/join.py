"""Find the records, and for each one the dense runs that it may be compared with.

The baseline of a record is the run of `spec.baseline()`, the best dense run the fastest of
`spec.best_dense()`; both are found by digest, never by file name. Unlike things are not compared:
where the model revision, the device, the workload, the tokenizer or the type differ, there is a
reason instead of a ratio.

Where a dense run was measured several times, the record that took turns with the one at hand is
preferred to the newest. Which decode mode is the best dense one is decided by speed alone: a slow
dense run does not become the best by having been measured beside the artefact.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, get_args

from compresskit import store, validity
from compresskit.errors import RecordError, UsageError
from compresskit.metrics import METRICS
from compresskit.metrics.money import repriced
from compresskit.metrics.pairs import side_by_side
from compresskit.record import Measured
from compresskit.spec import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from compresskit.record import Record, Validity
    from compresskit.spec import RunSpec

_NO_PRICES: Mapping[str, float | str] = MappingProxyType({})
_HEADLINE = METRICS["decode_tokens_per_s"]


@dataclass(frozen=True)
class Match:
    """The record to compare with, or the reason why there is none."""

    record: Record | None = None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One record with its verdict, judged now, and what it is compared with."""

    record: Record
    validity: Validity
    baseline: Match
    best_dense: Match


@dataclass(frozen=True)
class Joined:
    """All records that could be read, and what was left out."""

    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()


def load(paths: Sequence[Path], prices: Mapping[str, float | str] = _NO_PRICES) -> Joined:
    """Read records from files and, recursively, from folders.

    What cannot be read is left out with a warning, unless nothing is left. `prices` (fields of
    `compresskit.spec.Prices`) stand in for what the records say.

    Raises:
        UsageError: a path does not exist, there is no record at all, or a price makes no sense.
        RecordError: there are records, but none can be read.
    """
    found: list[Record] = []
    seen: dict[tuple[str, str], list[Record]] = {}
    warnings: list[str] = []
    with store.many():
        for path in _files(paths):
            try:
                one = store.load(path)
            except RecordError as error:
                warnings.append(f"left out: {error}")
                continue
            one = repriced(one, prices)
            # Whole records are compared only where they might be copies.
            alike = seen.setdefault((one.digest, one.started_at), [])
            if one not in alike:
                alike.append(one)
                found.append(one)
    if not found:
        where = ", ".join(map(str, paths))
        if warnings:
            raise RecordError(f"no readable record in {where}. " + " ".join(warnings))
        raise UsageError(f"no record in {where}. Make some with: compresskit run --out {where}")
    found.sort(key=_order)
    return Joined(of(found).rows, tuple(warnings))


def _files(paths: Sequence[Path]) -> list[Path]:
    files: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder.")
        files.update(dict.fromkeys(store.files(path)))
    return list(files)


def _order(one: Record) -> tuple[object, ...]:
    """Dense runs first, eager before the other modes; then as they were run."""
    mode = get_args(Mode).index(one.spec.engine.mode)
    return bool(one.spec.stack), mode if not one.spec.stack else 0, one.started_at, one.digest


def of(found: Iterable[Record]) -> Joined:
    """Join records that are in memory; they keep their order."""
    judged = [_Judged(one, validity.judge(one)) for one in found]
    by_digest: dict[str, list[_Judged]] = {}
    for each in judged:
        by_digest.setdefault(each.record.digest, []).append(each)
    rows = []
    for one, verdict in judged:
        if verdict.verdict == "INVALID":
            refused = Match(reason="an INVALID record is not compared")
            rows.append(Row(one, verdict, refused, refused))
            continue
        baseline = _match(one, [one.spec.baseline()], by_digest)
        best = _match(one, one.spec.best_dense(), by_digest)
        rows.append(Row(one, verdict, baseline, best))
    return Joined(tuple(rows))


class _Judged(NamedTuple):
    record: Record
    validity: Validity


def _match(one: Record, specs: Sequence[RunSpec], by_digest: Mapping[str, list[_Judged]]) -> Match:
    """The fastest among the records of `specs` that are comparable with `one`, one a spec."""
    digests = [spec.digest() for spec in specs]
    if digests == [one.digest]:
        return Match(one)
    named = [found for digest in digests for found in by_digest.get(digest, ())]
    if not named:
        return Match(reason="its dense baseline is not among these records")
    sound = [found.record for found in named if found.validity.verdict != "INVALID"]
    if not sound:
        first = named[0].record
        was = "is INVALID" if first.status == "ok" else f"was {first.status}"
        return Match(reason=f"its dense baseline {was}")
    comparable = [other for other in sound if not differences(one, other)]
    if not comparable:
        what = ", ".join(differences(one, sound[0]))
        return Match(reason=f"its dense baseline differs in {what}")
    by_spec = [[other for other in comparable if other.digest == digest] for digest in digests]
    return Match(max((_nearest(one, found) for found in by_spec if found), key=_speed))


def _nearest(one: Record, found: list[Record]) -> Record:
    """Of several records of one spec: `one` itself, one that took turns with it, the newest."""
    if any(other is one for other in found):
        return one
    paired = [other for other in found if side_by_side(_HEADLINE, one, other).one]
    return max(paired or found, key=lambda other: other.started_at)


def _speed(one: Record) -> float:
    reading = _HEADLINE.value(one)
    return reading.value if isinstance(reading, Measured) else 0.0


def differences(one: Record, other: Record) -> list[str]:
    """What forbids a comparison of two records, in words; empty if nothing does."""
    mine, theirs = _identity(one), _identity(other)
    return [name for name in mine if mine[name] != theirs[name]]


def _identity(one: Record) -> dict[str, object]:
    """What two records must share before one is divided by the other."""
    return {
        "model revision": one.model and one.model.revision,
        "tokenizer": one.model and one.model.tokenizer_sha256,
        "dtype": one.model and one.model.dtype,
        "device": one.device and one.device.name,
        "workload": one.spec.workload,
        "prompts": (one.prompts and one.prompts.sha256, one.prompts_sha256),
        "torch version": one.environment and one.environment.packages.get("torch"),
    }
