"""Rows grouped by the bits that they really take: quality compared at equal bits.

Two schemes "of 4 bits" may differ by half a bit in scales and zero points, and by far more in what
they leave dense. So rows are put into bands of effective bits per parameter of the whole model (all
bytes held, over the parameters before compression), and a band says from where to where its rows
reach. Inside a band the closest to the dense model comes first.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from compresskit.report.columns import Column
from compresskit.report.labels import clean

if TYPE_CHECKING:
    from compresskit.report.table import Group, Row, Table

KEY = "effective_bits_per_parameter"
BITS = Column(KEY, "bits/\nparam", "cost and quality", "plain")
UNKNOWN = "bits unknown"


def bits_of(row: Row) -> float | None:
    """Effective bits per parameter of a row, if they were measured."""
    return row.cells[KEY].value


def on_grid(row: Row) -> bool:
    """Whether the dense model was on the row's own grid already, which makes its quality mean nothing.

    Quantising leaves that warning in the facts, and the verdict repeats it.
    """
    return any("already on this grid" in reason for reason in row.validity.reasons)


def by_bits(table: Table) -> Table:
    """The same table with the rows of each group in bands of bits, widest first."""
    notes = dict.fromkeys(table.notes)
    groups = tuple(_banded(group, notes) for group in table.groups)
    return replace(table, groups=groups, notes=tuple(notes))


def _banded(group: Group, notes: dict[str, None]) -> Group:
    bands: dict[int | None, list[Row]] = {}
    for row in group.rows:
        bits = bits_of(row)
        bands.setdefault(None if bits is None else math.floor(bits), []).append(row)
    rows = []
    for floor in sorted(bands, key=lambda one: math.inf if one is None else -one):
        members = sorted(bands[floor], key=_closeness)
        name = UNKNOWN if floor is None else _name(floor, [bits_of(row) or 0.0 for row in members])
        rows += [replace(_noted(row, notes), band=name) for row in members]
    after = next(i for i, c in enumerate(group.columns) if c.key == "weights_bytes") + 1
    columns = (*group.columns[:after], BITS, *group.columns[after:])
    return replace(group, rows=tuple(rows), columns=columns, shown=group.shown | {KEY})


def _noted(row: Row, notes: dict[str, None]) -> Row:
    """Number why a row has no bits, as for every number that is not known."""
    cell = row.cells[KEY]
    if cell.kind != "unavailable" or not cell.reason:
        return row
    reason = clean(cell.reason)
    notes.setdefault(reason)
    return replace(row, cells={**row.cells, KEY: replace(cell, note=list(notes).index(reason) + 1)})


def _closeness(row: Row) -> tuple[int, float]:
    """Dense rows, then by KL; last, unranked, those without one or on the grid of the baseline."""
    kl = row.cells["kl_mean_nats"].value
    if row.dense:
        return (0, 0.0)
    return (2, 0.0) if kl is None or on_grid(row) else (1, kl)


def _name(floor: int, bits: list[float]) -> str:
    """The band in words, with where its rows reach.

    >>> _name(4, [4.25, 4.831]), _name(16, [16.0, 16.002])
    ('4.x bits (4.25 to 4.83)', '16 bits')
    """
    low, high = f"{min(bits):.2f}", f"{max(bits):.2f}"
    if low == high == f"{floor}.00":
        return f"{floor} bits"
    reach = low if low == high else f"{low} to {high}"
    return f"{floor}.x bits ({reach})"
