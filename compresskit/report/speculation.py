"""Rows that speculate, with what they accepted, where their time went, and what was to be expected.

A high acceptance is not a high speed: drafting, wider passes and the host cost what the shares show.
The predicted ratio comes from these parts (`metrics.speedup`) and stands beside the measured ones;
best k is the draft length that the same model would choose on this machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compresskit.report.columns import Column
from compresskit.report.footnotes import renumbered

if TYPE_CHECKING:
    from compresskit.report.table import Group, Row, Table

COLUMNS = (
    Column("decode_tokens_per_s", "decode\ntok/s", "speed", "plain"),
    Column("tokens_per_step", "tok/\nstep", "speed", "plain"),
    Column("draft_acceptance_rate", "accepted", "speed", "share"),
    Column("conditional_acceptance_at_1", "α at\n1", "speed", "plain"),
    Column("conditional_acceptance_at_2", "α at\n2", "speed", "plain"),
    Column("conditional_acceptance_at_3", "α at\n3", "speed", "plain"),
    Column("draft_share", "draft", "speed", "share"),
    Column("verify_share", "verify", "speed", "share"),
    Column("host_share", "host", "speed", "share"),
    Column("predicted_ratio_to_baseline", "×\npredicted", "speed", "ratio"),
    Column("prediction_over_measured", "time pred./\nmeasured", "speed", "ratio"),
    Column("decode_ratio_to_baseline", "× same-mode\ndense", "speed", "ratio"),
    Column("decode_ratio_to_best_dense", "× best\ndense", "speed", "ratio"),
    Column("best_draft_length", "best\nk", "speed", "count"),
    Column("lossless", "lossless", "speed", "words"),
)
LEGEND = (
    "accepted: drafted tokens that were delivered. α at n: acceptance of the drafted token n, those "
    "before it accepted. draft, verify, host: shares of a decode step. × predicted and best k: from "
    "α, the shares and the probed cost of wider passes, over the measured same-mode dense row; a "
    "model, not a measurement: time pred./measured says how far it is off. lossless: what the rule "
    "of acceptance promises (exact tokens, their distribution, or none)."
)


def by_speculation(table: Table) -> Table:
    """Only rows that speculate and dense ones, with the columns that are about speculation.

    Footnotes are numbered anew: those of columns that are not printed would explain nothing.
    """
    notes: dict[str, int] = {}
    found = [_narrowed(group, notes, table.notes) for group in table.groups]
    groups = tuple(group for group in found if group is not None)
    warnings = table.warnings if groups else (*table.warnings, "no run here speculates.")
    return replace(table, groups=groups, notes=tuple(notes), warnings=warnings)


def _narrowed(group: Group, notes: dict[str, int], before: tuple[str, ...]) -> Group | None:
    rows = [row for row in group.rows if row.dense or _speculates(row)]
    if not any(map(_speculates, rows)):
        return None
    return replace(
        group,
        columns=COLUMNS,
        rows=tuple(renumbered(row, COLUMNS, notes, before) for row in rows),
        shown=frozenset(column.key for column in COLUMNS),
    )


def _speculates(row: Row) -> bool:
    return row.cells["draft_acceptance_rate"].kind != "reference"
