"""Footnotes of a table that prints other columns than the one it was made from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compresskit.report.labels import clean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compresskit.report.columns import Column
    from compresskit.report.table import Row


def renumbered(
    row: Row, columns: Iterable[Column], notes: dict[str, int], before: Sequence[str]
) -> Row:
    """The row with the cells of `columns` numbered anew: other footnotes would explain nothing.

    notes: sentences with their numbers, added to. before: the footnotes that the row refers to now.
    """

    def number(sentence: str) -> int:
        return notes.setdefault(clean(sentence), len(notes) + 1)

    cells = dict(row.cells)
    for column in columns:
        cell = row.cells[column.key]
        said = cell.reason if cell.kind == "unavailable" else cell.remark
        cells[column.key] = replace(cell, note=number(said) if said else None)
    note = None if row.note is None else number(before[row.note - 1])
    return replace(row, cells=cells, note=note)
