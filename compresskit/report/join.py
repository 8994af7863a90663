"""Find the records, and for each one the dense runs that it may be compared with.

The baseline of a record is the run of `spec.baseline()`, the best dense run the fastest of
`spec.best_dense()`; both are found by digest, never by file name. Unlike things are not compared:
where the model revision, the device, the workload, the tokenizer or the type differ, there is a
reason instead of a ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from compresskit import store, validity
from compresskit.errors import RecordError, UsageError
from compresskit.metrics import METRICS
from compresskit.record import Measured
from compresskit.spec import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from compresskit.record import Record, Validity

_NOT_RECORDS = frozenset({"machine.json", "interleaved.json"})


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


def load(paths: Sequence[Path]) -> Joined:
    """Read records from files and, recursively, from folders.

    What cannot be read is left out with a warning, unless nothing is left.

    Raises:
        UsageError: a path does not exist, or there is no record at all.
        RecordError: there are records, but none can be read.
    """
    found: list[Record] = []
    warnings: list[str] = []
    for path in _files(paths):
        try:
            one = store.load(path)
        except RecordError as error:
            warnings.append(f"left out: {error}")
            continue
        if one not in found:
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
        if path.is_dir():
            for child in sorted(path.rglob("*.json")):
                if child.name not in _NOT_RECORDS and not child.name.startswith("."):
                    files[child] = None
        elif path.exists():
            files[path] = None
        else:
            raise UsageError(f"{path}: no such file or folder.")
    return list(files)


def _order(one: Record) -> tuple[object, ...]:
    """Dense runs first, eager before the other modes; then as they were run."""
    mode = get_args(Mode).index(one.spec.engine.mode)
    return bool(one.spec.stack), mode if not one.spec.stack else 0, one.started_at, one.digest


def of(found: Iterable[Record]) -> Joined:
    """Join records that are in memory; they keep their order."""
    judged = [(one, validity.judge(one)) for one in found]
    usable = [one for one, verdict in judged if verdict.verdict != "INVALID"]
    every = [one for one, _ in judged]
    rows = []
    for one, verdict in judged:
        if verdict.verdict == "INVALID":
            refused = Match(reason="an INVALID record is not compared")
            rows.append(Row(one, verdict, refused, refused))
            continue
        baseline = _match(one, {one.spec.baseline().digest()}, every, usable, _newest)
        digests = {spec.digest() for spec in one.spec.best_dense()}
        rows.append(Row(one, verdict, baseline, _match(one, digests, every, usable, _fastest)))
    return Joined(tuple(rows))


def _match(
    one: Record,
    digests: set[str],
    every: list[Record],
    usable: list[Record],
    choose: Callable[[list[Record]], Record],
) -> Match:
    """Choose among the records that bear one of `digests` and are comparable with `one`."""
    if one.digest in digests and len(digests) == 1:
        return Match(one)
    named = [other for other in every if other.digest in digests]
    if not named:
        return Match(reason="its dense baseline is not among these records")
    sound = [other for other in named if other in usable]
    if not sound:
        was = "is INVALID" if named[0].status == "ok" else f"was {named[0].status}"
        return Match(reason=f"its dense baseline {was}")
    comparable = [other for other in sound if not differences(one, other)]
    if not comparable:
        what = ", ".join(differences(one, sound[0]))
        return Match(reason=f"its dense baseline differs in {what}")
    return Match(choose(comparable))


def _newest(candidates: list[Record]) -> Record:
    return max(candidates, key=lambda one: one.started_at)


def _fastest(candidates: list[Record]) -> Record:
    return max(candidates, key=_speed)


def _speed(one: Record) -> float:
    reading = METRICS["decode_tokens_per_s"].value(one)
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
