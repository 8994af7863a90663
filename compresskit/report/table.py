"""Rows and columns, before anybody prints them.

Rows that may be compared share a group: one model, device, type and workload. A group has a
section on speed, one on cost and quality, one on the machine's limits and on money where those are
known, one on long-context tasks where any were asked, and, where several batch sizes were measured,
one with a column per batch size. Runs that were skipped or failed are listed with their reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from compresskit.metrics import IS_BASELINE, METRICS, decode_at
from compresskit.metrics.cache import OWN, changed
from compresskit.metrics.energy import ENERGY
from compresskit.metrics.speculation import speculates
from compresskit.metrics.training import NOT_TRAINED, student
from compresskit.report import derived, tasks
from compresskit.report.cells import INVALID, REFERENCE, SIMULATED, Cell, of_reading
from compresskit.report.columns import (
    CACHE_KEYS,
    COLUMNS,
    SPECULATION_KEYS,
    SPEED_KEYS,
    STUDENT_KEYS,
    Column,
)
from compresskit.report.labels import clean, context, group_key, labels, short_label
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compresskit.metrics import Metric
    from compresskit.record import Record, Validity
    from compresskit.report.columns import Section
    from compresskit.report.join import Joined, Row as JoinedRow
    from compresskit.spec import Prices


@dataclass(frozen=True)
class Row:
    """One run that ended."""

    label: str
    mode: str
    digest: str
    dense: bool
    validity: Validity
    cells: dict[str, Cell]
    prices: Prices | None = None
    note: int | None = None
    """Footnote with the reasons of the validity."""
    band: str = ""
    """What it shares with its neighbours, where rows are grouped (see `bits`)."""
    families: tuple[str, ...] = ()
    """Of the methods of its stack, in order: quant, distill ..."""

    def name(self) -> str:
        """Label and mode in one."""
        return self.label if self.mode == "eager" else f"{self.label} ({self.mode})"


@dataclass(frozen=True)
class Group:
    """Rows that may be compared, and what they have in common."""

    context: dict[str, str | int]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    shown: frozenset[str]
    """Keys of the columns that have something to show on paper."""

    def heading(self) -> str:
        """The context in one line."""
        c = self.context
        threads = f"{c['threads']} thread{'' if c['threads'] == 1 else 's'}"
        kind = "" if c["text"] == "embedded" else f" ({c['text']})"
        return (
            f"{c['model']} ({c['revision']}, {c['baseline']}), {c['dtype']}, {c['device']}, {threads}; "
            f"{c['prompt_tokens']} prompt{kind} + {c['new_tokens']} new tokens, batch {c['batch']}"
        )

    def section(self, name: Section) -> tuple[Column, ...]:
        """Columns of one section that have something to show."""
        return tuple(c for c in self.columns if c.section == name and c.key in self.shown)

    def bands(self) -> tuple[tuple[str, tuple[Row, ...]], ...]:
        """Neighbours of one band; one unnamed band where rows are not grouped."""
        return tuple((band, tuple(found)) for band, found in groupby(self.rows, lambda r: r.band))


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
            grouped.setdefault(group_key(row.record), []).append(row)
    notes: dict[str, int] = {}
    return Table(
        groups=tuple(_group(rows, notes) for rows in grouped.values()),
        problems=tuple(_problem(r.record) for r in joined.rows if r.record.status != "ok"),
        notes=tuple(notes),
        warnings=joined.warnings,
    )


def _problem(record: Record) -> Problem:
    return Problem(
        label=short_label(record),
        mode=record.spec.engine.manner,
        digest=record.digest,
        model=clean(record.spec.model.name),
        status=record.status,
        reason=clean(record.reason or "no reason was stored"),
    )


def _group(joined: list[JoinedRow], notes: dict[str, int]) -> Group:
    batches = _batches(row.record for row in joined)
    asked = tasks.columns(row.record for row in joined)
    columns = (
        *COLUMNS,
        *asked,
        *(Column(decode_at(b).name, f"batch {b}\ntok/s", "batch", "plain") for b in batches),
    )
    names = labels([row.record for row in joined])
    rows = [_row(row, name, batches, asked) for row, name in zip(joined, names, strict=True)]
    shown = frozenset(c.key for c in columns if c.section != "files" and _has_news(c, rows))
    return Group(
        context=context(joined[0].record),
        columns=columns,
        rows=tuple(_with_footnotes(row, shown, notes) for row in rows),
        shown=shown,
    )


def _batches(records: Iterable[Record]) -> list[int]:
    """All batch sizes, where there is more than one."""
    sizes = sorted({size for record in records for size in record.spec.workload.batch_sizes})
    return sizes if len(sizes) > 1 else []


def _has_news(column: Column, rows: Sequence[Row]) -> bool:
    """Whether a column is worth its width in this group."""
    if column.when == "always":
        return True
    if column.when == "some number":
        cells = [row.cells[column.key] for row in rows]
        return any(cell.value is not None or cell.words for cell in cells)
    return any(row.prices and getattr(row.prices, column.when) is not None for row in rows)


def _row(joined: JoinedRow, label: str, batches: list[int], asked: Iterable[Column]) -> Row:
    record = joined.record
    cells = {column.key: _cell(column.key, joined) for column in COLUMNS}
    for batch in batches:
        metric = decode_at(batch)
        cells[metric.name] = _no_speed(joined) or _of_metric(metric, record)
    cells |= tasks.cells(record, asked)
    cells["kl_mean_nats"] = _with_quality_notes(cells["kl_mean_nats"], record)
    return Row(
        label=label,
        mode=record.spec.engine.manner,
        digest=record.digest,
        dense=not record.spec.stack,
        validity=joined.validity,
        cells=cells,
        prices=record.prices,
        families=tuple(dict.fromkeys(m.name.partition("/")[0] for m in record.spec.stack)),
    )


def _cell(key: str, joined: JoinedRow) -> Cell:
    if key in SPECULATION_KEYS and not speculates(joined.record):
        return Cell("reference", reason="decodes one token per step")
    if key in CACHE_KEYS and not changed(joined.record):
        return Cell("reference", reason=OWN)
    if key in STUDENT_KEYS and student(joined.record) is None:
        return Cell("reference", reason=NOT_TRAINED)
    if key in SPEED_KEYS and (refused := _no_speed(joined)) is not None:
        return refused
    return derived.of_row(key, joined) or _of_metric(METRICS[key], joined.record)


def _no_speed(joined: JoinedRow) -> Cell | None:
    """A number that means nothing is not printed beside numbers that do."""
    if joined.record.simulated:
        return SIMULATED
    return INVALID if joined.validity.verdict == "INVALID" else None


def _of_metric(metric: Metric, record: Record) -> Cell:
    reading = metric.value(record)
    if reading.kind == "unavailable" and reading.reason == IS_BASELINE:
        return REFERENCE
    cell = of_reading(reading, stderr=metric.stderr(record))
    if metric in ENERGY:
        return derived.with_provenance(cell, reading, record)
    if metric.unit is Unit.CURRENCY_PER_MTOK and record.prices is not None:
        return replace(cell, currency=clean(record.prices.currency))
    return cell


def _with_quality_notes(cell: Cell, record: Record) -> Cell:
    """Hang what the quality pass wants said on the distance from the baseline."""
    if record.quality is None or not record.quality.notes or cell.value is None:
        return cell
    told = clean("; ".join(record.quality.notes))
    return replace(cell, remark=told, reason=told)


def _with_footnotes(row: Row, shown: frozenset[str], notes: dict[str, int]) -> Row:
    """Number what the cells that are printed want said; equal sentences share a footnote."""

    def number(sentence: str) -> int:
        return notes.setdefault(clean(sentence), len(notes) + 1)

    cells = dict(row.cells)
    for key, cell in row.cells.items():
        said = cell.reason if cell.kind == "unavailable" else cell.remark
        if key in shown and said:
            cells[key] = replace(cell, note=number(said))
    reasons = "; ".join(row.validity.reasons)
    note = number(f"{row.name()}: {reasons}") if reasons else None
    return replace(row, cells=cells, note=note)
