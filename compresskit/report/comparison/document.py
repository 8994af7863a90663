"""The comparison for programs: JSON-ready, full precision, every outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.report.comparison.words import message

if TYPE_CHECKING:
    from pydantic import JsonValue

    from compresskit.compare import Comparison, Outcome, Row
    from compresskit.record import Record

FORMAT = "compresskit.comparison/1"


def render(comparison: Comparison, *, passed: bool) -> dict[str, JsonValue]:
    """Return `comparison` as a JSON document."""
    return {
        "format": FORMAT,
        "passed": passed,
        "counts": {**comparison.counts()},
        "failures": [message(row, outcome) for row, outcome in comparison.failures()],
        "rows": [_row(row) for row in comparison.rows],
        "refused": [
            {"label": one.label, "digest": one.digest, "reason": one.reason}
            for one in comparison.refused
        ],
        "only_base": [_named(record) for record in comparison.only_base],
        "only_new": [_named(record) for record in comparison.only_new],
        "notes": list(comparison.notes),
    }


def _named(record: Record) -> JsonValue:
    return {"label": record.label, "digest": record.digest}


def _row(row: Row) -> JsonValue:
    return {
        "label": row.label,
        "base": {"digest": row.base.digest, "started_at": row.base.started_at},
        "new": {"digest": row.new.digest, "started_at": row.new.started_at},
        "outcomes": [_outcome(outcome) for outcome in row.outcomes],
    }


def _outcome(outcome: Outcome) -> JsonValue:
    """Every number it has; parts that do not apply are left out."""
    found: dict[str, JsonValue] = {
        "tier": outcome.tier,
        "metric": outcome.metric,
        "verdict": outcome.word,
        "base": outcome.base,
        "new": outcome.new,
    }
    if outcome.unit is not None:
        found["unit"] = outcome.unit.value
    for name in ("ratio", "delta"):
        interval = getattr(outcome, name)
        if interval is not None:
            found[name] = dict(zip(("value", "low", "high"), interval, strict=True))
    for name in ("tolerance", "p", "n_base", "n_new"):
        part = getattr(outcome, name)
        if part is not None:
            found[name] = part
    if outcome.reason:
        found["reason"] = outcome.reason
    return found
