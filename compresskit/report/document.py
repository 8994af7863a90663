"""The table for programs: JSON-ready, full precision, a reason wherever a number is null."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from compresskit.metrics import METRICS

if TYPE_CHECKING:
    from pydantic import JsonValue

    from compresskit.report.cells import Cell
    from compresskit.report.table import Group, Row, Table

FORMAT = "compresskit.table/2"


def render(table: Table) -> dict[str, JsonValue]:
    """Return `table` as a JSON document."""
    return {
        "format": FORMAT,
        "groups": [_group(group) for group in table.groups],
        "problems": [asdict(problem) for problem in table.problems],
        "warnings": list(table.warnings),
        "definitions": {
            key: METRICS[key].definition for key in sorted(_keys(table)) if key in METRICS
        },
    }


def _keys(table: Table) -> set[str]:
    return {column.key for group in table.groups for column in group.columns}


def _group(group: Group) -> JsonValue:
    return {"context": {**group.context}, "rows": [_row(row) for row in group.rows]}


def _row(row: Row) -> JsonValue:
    return {
        "label": row.label,
        "mode": row.mode,
        "digest": row.digest,
        "dense": row.dense,
        "validity": row.validity.verdict,
        "reasons": list(row.validity.reasons),
        **({"band": row.band} if row.band else {}),
        "cells": {key: _cell(cell) for key, cell in row.cells.items()},
    }


def _cell(cell: Cell) -> JsonValue:
    """A number with its unit and spread, or null with its reason; absent parts are left out."""
    cells: dict[str, JsonValue] = {"kind": cell.kind, "value": cell.value}
    for name in ("unit", "low", "high", "stderr"):
        part = getattr(cell, name)
        if part is not None:
            cells[name] = str(part) if name == "unit" else part
    for name in ("words", "currency", "provenance", "scope", "reason"):
        if part := getattr(cell, name):
            cells[name] = part
    if (found := cell.comparison) is not None:
        cells["paired"] = found.paired
        if found.verdict is not None:
            cells |= {"verdict": found.verdict, "p": found.p, "n": found.n, "factor": found.factor}
        if found.reason:
            cells["verdict_reason"] = found.reason
    return cells
