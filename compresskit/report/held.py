"""Rows in the order of what their caches hold: loss compared at equal bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compresskit.report.table import Row, Table

KEY = "cache_achieved_ratio"


def by_cache(table: Table) -> Table:
    """The same table, the largest caches first; rows whose bytes are unknown come last."""
    return replace(
        table,
        groups=tuple(
            replace(group, rows=tuple(sorted(group.rows, key=_share))) for group in table.groups
        ),
    )


def _share(row: Row) -> tuple[bool, float]:
    ratio = row.cells[KEY].value
    return not row.dense, math.inf if ratio is None else ratio
