"""Teacher, students and quantised ones of both on one page, with what training cost.

The rows stand in bands: the teacher, its students, the quantised teacher, quantised students. Quality is
the distance from the teacher for all of them, bytes are those held, and bits are counted per parameter
of the teacher, so that a student of half its parameters in 16 bits stands beside 8 bits. A student that
counts tokens in its own way has no distance from the teacher; it is listed, and not ranked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from compresskit.report.bits import on_grid
from compresskit.report.cells import REFERENCE, Cell
from compresskit.report.columns import Column
from compresskit.report.footnotes import renumbered

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compresskit.report.table import Group, Row, Table

PARETO = "pareto"
COLUMNS = (
    Column("decode_tokens_per_s", "decode\ntok/s", "speed", "plain"),
    Column("decode_ratio_to_baseline", "× same-mode\ndense", "speed", "ratio"),
    Column("decode_ratio_to_best_dense", "× best\ndense", "speed", "ratio"),
    Column("weights_bytes", "weights", "cost and quality", "quantity"),
    Column("bits_per_teacher_parameter", "bits/teacher\nparam", "cost and quality", "plain"),
    Column("kl_mean_nats", "KL ± SE\n(nats)", "cost and quality", "spread"),
    Column("delta_nll_nats", "ΔNLL ± SE\n(nats)", "cost and quality", "signed"),
    Column("bits_per_byte", "bits/\nbyte", "cost and quality", "plain"),
    Column(PARETO, "best\nin", "cost and quality", "words"),
    Column("training_s", "training", "limits and money", "duration"),
    Column("training_tokens", "training\ntokens", "limits and money", "count"),
    Column("training_energy_j", "training\nenergy", "limits and money", "quantity"),
    Column("break_even_output_tokens_by_time", "break-even\n(time)", "limits and money", "count"),
    Column(
        "break_even_output_tokens_by_energy", "break-even\n(energy)", "limits and money", "count"
    ),
)
TEACHER = "teacher"
BANDS = (TEACHER, "students", "quantised teacher", "quantised students", "students in other stacks")
LEGEND = (
    "bits/teacher param: bytes of all weights over the parameters of the teacher. best in: no other row "
    "(the teacher with KL 0 among them) is as good in both KL and weights (bytes), or KL and decode rate "
    "(speed); by the numbers as printed, noise and all. training: of the student, by its card, with the "
    "teacher's passes in it; break-even counts it with compressing. A student without a card has a cost "
    "that nobody knows."
)
APART = (
    "has another tokenizer than the teacher: its tokens are others, and its bits per byte come from other "
    "stretches of the text"
)


def band_of(row: Row) -> str | None:
    """Where a row belongs; None for stacks that neither hold a student nor quantise alone."""
    families = set(row.families)
    if row.dense:
        return TEACHER
    if families == {"distill"}:
        return "students"
    if families == {"quant"}:
        return "quantised teacher"
    if families == {"distill", "quant"}:
        return "quantised students"
    return "students in other stacks" if "distill" in families else None


def by_students(table: Table) -> Table:
    """Only groups with a student, their rows in bands; other cache and decode methods are left out."""
    notes: dict[str, int] = {}
    groups = tuple(
        _banded(group, notes, table.notes)
        for group in _together(table.groups)
        if any("distill" in row.families for row in group.rows)
    )
    said = (*table.warnings, "no student here: give records of runs with distill/student.")
    return replace(
        table, groups=groups, notes=tuple(notes), warnings=table.warnings if groups else said
    )


def _together(groups: Iterable[Group]) -> list[Group]:
    """Groups that differ in nothing but the tokenizer as one, rows of another tokenizer last."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(repr(sorted(group.context.items())), []).append(group)
    merged = []
    for members in found.values():
        members.sort(key=lambda group: not any(row.dense for row in group.rows))
        first, *others = members
        if not any(row.dense for row in first.rows):
            merged += members
            continue
        apart = [_apart(row) for group in others for row in group.rows]
        merged.append(replace(first, rows=(*first.rows, *apart)))
    return merged


def _apart(row: Row) -> Row:
    """A row of another tokenizer, with the warning where it matters."""
    cells = dict(row.cells)
    for key in ("decode_tokens_per_s", "bits_per_byte"):
        if cells[key].value is not None:
            cells[key] = replace(cells[key], remark=f"{row.name()} {APART}")
    return replace(row, cells=cells)


def _banded(group: Group, notes: dict[str, int], before: tuple[str, ...]) -> Group:
    kept = [replace(row, band=band) for row in group.rows if (band := band_of(row)) is not None]
    kept.sort(key=lambda row: (BANDS.index(row.band), -(row.cells["weights_bytes"].value or 0.0)))
    ranked = _ranked(kept)
    rows = [
        renumbered(
            replace(row, cells={**row.cells, PARETO: _pareto(row, ranked)}), COLUMNS, notes, before
        )
        for row in kept
    ]
    return replace(
        group, columns=COLUMNS, rows=tuple(rows), shown=frozenset(column.key for column in COLUMNS)
    )


class Point(NamedTuple):
    """One row in the plane of loss and cost; less is better in both."""

    row: Row
    loss: float
    """KL from the teacher, nats per token; 0 for the teacher itself."""
    cost: float

    def beaten(self, others: Iterable[Point]) -> bool:
        """Whether another is no worse in both and better in one."""
        return any(
            one.loss <= self.loss and one.cost <= self.cost and one[1:] != self[1:]
            for one in others
        )


def points(rows: Iterable[Row], key: str, *, sign: float = 1.0) -> list[Point]:
    """Rows whose KL and number under `key` are known; `sign` -1 where more is better.

    Left out: INVALID rows, and those whose KL says nothing because the dense model lay on their grid.
    """
    found = []
    for row in rows:
        loss = 0.0 if row.dense else row.cells["kl_mean_nats"].value
        cost = row.cells[key].value
        if loss is None or cost is None or row.validity.verdict == "INVALID" or on_grid(row):
            continue
        found.append(Point(row, loss, sign * cost))
    return found


def _ranked(rows: Sequence[Row]) -> dict[str, list[Point]]:
    return {
        "bytes": points(rows, "weights_bytes"),
        "speed": points(rows, "decode_tokens_per_s", sign=-1.0),
    }


def _pareto(row: Row, ranked: dict[str, list[Point]]) -> Cell:
    if row.dense:
        return REFERENCE
    mine = {
        axis: next((one for one in found if one.row is row), None) for axis, found in ranked.items()
    }
    if not any(mine.values()):
        kl = row.cells["kl_mean_nats"]
        why = kl.reason if kl.value is None else "its numbers are not ranked"
        return Cell("unavailable", reason=why)
    best = [axis for axis, one in mine.items() if one and not one.beaten(ranked[axis])]
    return Cell("derived", words=", ".join(best) or "neither")
