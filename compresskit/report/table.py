"""Rows and columns, before anybody prints them.

Rows that may be compared share a group: one model, device, type and workload. A group has a
section on speed, one on cost and quality, and, where several batch sizes were measured, one with
a column per batch size. Runs that were skipped or failed are listed with their reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compresskit.metrics import IS_BASELINE, METRICS, decode_at, main_batch
from compresskit.report.cells import INVALID, REFERENCE, SIMULATED, Cell, of_reading
from compresskit.report.columns import COLUMNS, SPECULATION_KEYS, SPEED_KEYS, Column
from compresskit.stats import ratio_of_medians
from compresskit.units import Unit
from compresskit.validity import FEWEST_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compresskit.metrics import Metric
    from compresskit.record import Record, Validity
    from compresskit.report.columns import Section
    from compresskit.report.join import Joined, Match, Row as JoinedRow


@dataclass(frozen=True)
class Row:
    """One run that ended."""

    label: str
    mode: str
    digest: str
    dense: bool
    validity: Validity
    cells: dict[str, Cell]
    note: int | None = None
    """Footnote with the reasons of the verdict."""

    def name(self) -> str:
        """Label and mode in one."""
        return self.label if self.mode == "eager" else f"{self.label} ({self.mode})"


@dataclass(frozen=True)
class Group:
    """Rows that may be compared, and what they have in common."""

    context: dict[str, str | int]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def heading(self) -> str:
        """The context in one line."""
        c = self.context
        threads = f"{c['threads']} thread{'' if c['threads'] == 1 else 's'}"
        return (
            f"{c['model']} ({c['revision']}, {c['baseline']}), {c['dtype']}, {c['device']}, {threads}; "
            f"{c['prompt_tokens']} prompt + {c['new_tokens']} new tokens, batch {c['batch']}"
        )

    def section(self, name: Section) -> tuple[Column, ...]:
        """Columns of one section that have something to show."""
        return tuple(c for c in self.columns if c.section == name and self._shown(c))

    def _shown(self, column: Column) -> bool:
        return not column.optional or any(
            row.cells[column.key].value is not None for row in self.rows
        )


@dataclass(frozen=True)
class Problem:
    """A run without numbers."""

    label: str
    mode: str
    digest: str
    model: str
    status: str
    reason: str


@dataclass(frozen=True)
class Table:
    """Everything a renderer needs."""

    groups: tuple[Group, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    """Footnotes; number 1 is the first."""
    warnings: tuple[str, ...]

    def all_invalid(self) -> bool:
        """Whether no row may be used."""
        verdicts = [row.validity.verdict for group in self.groups for row in group.rows]
        return all(verdict == "INVALID" for verdict in verdicts)


def build(joined: Joined) -> Table:
    """Build the table of joined records."""
    grouped: dict[str, list[JoinedRow]] = {}
    for row in joined.rows:
        if row.record.status == "ok":
            grouped.setdefault(_group_key(row.record), []).append(row)
    notes: dict[str, int] = {}
    return Table(
        groups=tuple(_group(rows, notes) for rows in grouped.values()),
        problems=tuple(_problem(r.record) for r in joined.rows if r.record.status != "ok"),
        notes=tuple(notes),
        warnings=joined.warnings,
    )


def _group_key(record: Record) -> str:
    """Same key, same table: what a reader may compare at a glance."""
    model = record.model
    return repr(
        (
            record.spec.model.name,
            model and (model.revision, model.tokenizer_sha256, model.dtype),
            record.device and record.device.name,
            record.spec.workload,
            record.prompts and record.prompts.sha256,
            record.spec.protocol.threads,
        )
    )


def _group(rows: list[JoinedRow], notes: dict[str, int]) -> Group:
    first = rows[0].record
    batches = _batches(row.record for row in rows)
    extra = tuple(
        Column(decode_at(batch).name, f"batch {batch}\ntok/s", "batch", "plain")
        for batch in batches
    )
    labels = _labels([row.record for row in rows])
    return Group(
        context=_context(first),
        columns=(*COLUMNS, *extra),
        rows=tuple(
            _row(row, label, batches, notes) for row, label in zip(rows, labels, strict=True)
        ),
    )


def _context(record: Record) -> dict[str, str | int]:
    spec, model, device = record.spec, record.model, record.device
    return {
        "model": clean(spec.model.name),
        "revision": _short_revision(model.revision) if model else "unknown revision",
        "baseline": model.baseline.replace("_", " ") if model else "unknown baseline",
        "dtype": model.dtype if model else "unknown type",
        "device": clean(device.name) if device else "unknown device",
        "threads": spec.protocol.threads,
        "prompt_tokens": spec.workload.prompt_tokens,
        "new_tokens": spec.workload.new_tokens,
        "batch": main_batch(record),
    }


def _short_revision(revision: str) -> str:
    """Twelve digits of a hash are enough to read; names stay whole."""
    is_hash = len(revision) >= 40 and all(letter in "0123456789abcdef" for letter in revision)
    return revision[:12] if is_hash else clean(revision)


def _batches(records: Iterable[Record]) -> list[int]:
    """All batch sizes, where there is more than one."""
    sizes = sorted({size for record in records for size in record.spec.workload.batch_sizes})
    return sizes if len(sizes) > 1 else []


def clean(words: str) -> str:
    """Names come from files: keep control characters away from terminals."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(words.split()))


def short_label(record: Record) -> str:
    """The label without the mode, which has its own column."""
    return clean(record.label).removesuffix(f" ({record.spec.engine.mode})")


def _labels(records: list[Record]) -> list[str]:
    """Labels that tell the rows apart: equal ones get their digest."""
    names = [(short_label(record), record.spec.engine.mode) for record in records]
    return [
        f"{name[0]} #{record.digest[:6]}" if names.count(name) > 1 else name[0]
        for name, record in zip(names, records, strict=True)
    ]


def _problem(record: Record) -> Problem:
    return Problem(
        label=short_label(record),
        mode=record.spec.engine.mode,
        digest=record.digest,
        model=clean(record.spec.model.name),
        status=record.status,
        reason=clean(record.reason or "no reason was stored"),
    )


def _row(joined: JoinedRow, label: str, batches: list[int], notes: dict[str, int]) -> Row:
    record = joined.record
    cells = {column.key: _cell(column.key, joined) for column in COLUMNS}
    for batch in batches:
        metric = decode_at(batch)
        cells[metric.name] = _no_speed(joined) or _of_metric(metric, record)
    cells["kl_mean_nats"] = _with_quality_notes(cells["kl_mean_nats"], record, notes)
    shown = {c.key for c in COLUMNS if c.section != "files"} | (cells.keys() - METRICS.keys())
    row = Row(
        label=label,
        mode=record.spec.engine.mode,
        digest=record.digest,
        dense=not record.spec.stack,
        validity=joined.validity,
        cells={k: _numbered(c, notes) if k in shown else c for k, c in cells.items()},
    )
    reasons = "; ".join(map(clean, joined.validity.reasons))
    return replace(row, note=_number(notes, f"{row.name()}: {reasons}")) if reasons else row


def _with_quality_notes(cell: Cell, record: Record, notes: dict[str, int]) -> Cell:
    """Hang what the quality pass wants said on the distance from the baseline."""
    if record.quality is None or not record.quality.notes or cell.value is None:
        return cell
    told = clean("; ".join(record.quality.notes))
    return replace(cell, note=_number(notes, told), reason=told)


def _number(notes: dict[str, int], sentence: str) -> int:
    return notes.setdefault(sentence, len(notes) + 1)


def _numbered(cell: Cell, notes: dict[str, int]) -> Cell:
    """Give an unavailable cell a footnote; equal reasons share one."""
    if cell.kind != "unavailable":
        return cell
    return replace(cell, note=_number(notes, clean(cell.reason)))


def _cell(key: str, joined: JoinedRow) -> Cell:
    if key in SPECULATION_KEYS and not METRICS["acceptance_rate"].samples(joined.record):
        return Cell("reference", reason="decodes one token per step")
    if key in SPEED_KEYS and (refused := _no_speed(joined)) is not None:
        return refused
    if key == "decode_ratio_to_baseline":
        return _ratio(joined.record, joined.baseline)
    if key == "decode_ratio_to_best_dense":
        return _ratio(joined.record, joined.best_dense)
    return _of_metric(METRICS[key], joined.record)


def _no_speed(joined: JoinedRow) -> Cell | None:
    """A number that means nothing is not printed beside numbers that do."""
    if joined.record.simulated:
        return SIMULATED
    return INVALID if joined.validity.verdict == "INVALID" else None


def _of_metric(metric: Metric, record: Record) -> Cell:
    reading = metric.value(record)
    if reading.kind == "unavailable" and reading.reason == IS_BASELINE:
        return REFERENCE
    return of_reading(reading, stderr=metric.stderr(record))


def _ratio(record: Record, match: Match) -> Cell:
    """Ratio of median decode rates; an interval only where both sides have enough repetitions."""
    if match.record is None:
        return Cell("unavailable", reason=match.reason)
    if match.record is record:
        return REFERENCE
    metric = METRICS["decode_tokens_per_s"]
    mine, theirs = metric.samples(record), metric.samples(match.record)
    if not mine or not theirs:
        return Cell("unavailable", reason="no decode rate on one of the two sides")
    found = ratio_of_medians(mine, theirs)
    if min(len(mine), len(theirs)) < FEWEST_SAMPLES:
        return Cell("measured", found.value, Unit.RATIO)
    return Cell("measured", found.value, Unit.RATIO, low=found.low, high=found.high)
