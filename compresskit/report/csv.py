"""The table for spreadsheets: one line per run, raw numbers, the unit in each heading.

An unavailable number is an empty field whose reason stands in `notes`; estimates have columns of
their own, so that nobody averages them with measured numbers by accident.
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from compresskit.report.columns import COLUMNS

if TYPE_CHECKING:
    from compresskit.report.cells import Cell, Comparison
    from compresskit.report.table import Group, Problem, Row, Table

_CONTEXT = (
    "model",
    "revision",
    "baseline",
    "dtype",
    "device",
    "threads",
    "prompt_tokens",
    "new_tokens",
    "batch",
)
_ROW = ("label", "mode", "digest", "status", "validity", "reasons", "currency")
# Keys that do not say their unit yet.
_HEADINGS = {
    "top1_agreement": "top1_agreement_fraction",
    "draft_acceptance_rate": "draft_acceptance_rate_fraction",
    "mean_acceptance_length": "mean_acceptance_length_tokens",
    **{
        f"{kind}_acceptance_at_{place}": f"{kind}_acceptance_at_{place}_fraction"
        for kind in ("unconditional", "offered", "conditional")
        for place in (1, 2, 3)
    },
    "greedy_exact_match": "greedy_exact_match_fraction",
    "perplexity": "perplexity_per_token",
    "bound": "bound_by",
}
_ESTIMABLE = frozenset(
    {
        "peak_bytes",
        "j_per_output_token",
        "j_per_prefill_token",
        "setup_energy_j",
        "training_energy_j",
        "electricity_per_million_output_tokens",
        "gco2e_per_million_output_tokens",
        "kwh_per_million_output_tokens",
        "output_tokens_per_kwh",
        "break_even_output_tokens_by_energy",
    }
)
_OF_RATIO = ("low", "high", "paired", "verdict", "p", "n")


def render(table: Table) -> str:
    """Return `table` as CSV with a header line."""
    extra = list(
        dict.fromkeys(
            c.key for g in table.groups for c in g.columns if c.section in ("batch", "tasks")
        )
    )
    keys = [*(column.key for column in COLUMNS), *extra]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    banded = any(row.band for group in table.groups for row in group.rows)
    last = ["notes", "band"] if banded else ["notes"]
    writer.writerow([*_CONTEXT, *_ROW, *(h for key in keys for h in _headings(key)), *last])
    for group in table.groups:
        for row in group.rows:
            writer.writerow([*_line(group, row, keys), *([row.band] if banded else ())])
    for problem in table.problems:
        writer.writerow([*_problem(problem, keys), *([""] if banded else ())])
    return out.getvalue()


def _headings(key: str) -> list[str]:
    name = _HEADINGS.get(key, key)
    if key.startswith("decode_ratio"):
        return [name, *(f"{name}_{part}" for part in _OF_RATIO)]
    if key == "delta_nll_nats":
        return [name, "delta_nll_stderr_nats"]
    return [name, f"{name}_estimated"] if key in _ESTIMABLE else [name]


def _values(key: str, cell: Cell | None) -> list[float | str]:
    width = len(_headings(key))
    if cell is None or cell.value is None:
        return [cell.words if cell is not None else "", *[""] * (width - 1)]
    value = _plain(cell.value)
    if key.startswith("decode_ratio"):
        return [value, _plain(cell.low), _plain(cell.high), *_verdict(cell.comparison)]
    if key == "delta_nll_nats":
        return [value, _plain(cell.stderr)]
    if key in _ESTIMABLE:
        return ["", value] if cell.kind == "estimated" else [value, ""]
    return [value]


def _verdict(found: Comparison | None) -> list[float | str]:
    """Paired or not, the verdict, its p and the number of pairs."""
    if found is None:
        return [""] * 4
    pairs = "" if found.n is None else found.n
    return ["yes" if found.paired else "no", found.verdict or "", _plain(found.p), pairs]


def _plain(value: float | None) -> float | str:
    """The number as it is; whole numbers without a trailing zero, nothing for nothing."""
    if value is None:
        return ""
    return int(value) if value.is_integer() else value


def _line(group: Group, row: Row, keys: list[str]) -> list[object]:
    reasons: dict[str, list[str]] = {}
    for key, cell in row.cells.items():
        if cell.reason and cell.kind != "reference":
            reasons.setdefault(cell.reason, []).append(key)
    notes = [f"{', '.join(named)}: {reason}" for reason, named in reasons.items()]
    return [
        *(group.context[name] for name in _CONTEXT),
        row.label,
        row.mode,
        row.digest,
        "ok",
        row.validity.verdict,
        "; ".join(row.validity.reasons),
        "" if row.prices is None else row.prices.currency,
        *(value for key in keys for value in _values(key, row.cells.get(key))),
        "; ".join(notes),
    ]


def _problem(problem: Problem, keys: list[str]) -> list[object]:
    return [
        problem.model,
        *[""] * (len(_CONTEXT) - 1),
        problem.label,
        problem.mode,
        problem.digest,
        problem.status,
        "INVALID",
        problem.reason,
        "",
        *(value for key in keys for value in _values(key, None)),
        "",
    ]
