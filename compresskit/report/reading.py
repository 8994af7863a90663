"""A table in plain words: one sentence per run, and nothing that the numbers do not carry.

A word such as "faster" is used only where the two runs took turns and the verdict says so; a ratio
of runs that did not is told as such.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compresskit.metrics.money import pue
from compresskit.report.cells import count, signed, text
from compresskit.units import significant

if TYPE_CHECKING:
    from compresskit.report.cells import Cell, Style
    from compresskit.report.table import Group, Row, Table


def read(table: Table) -> str:
    """Return the sentences of `table`, one per line."""
    sentences = [
        sentence for group in table.groups for row in group.rows for sentence in _of_row(group, row)
    ]
    sentences += [
        f"{p.label} ({p.mode}) was {_STATUS[p.status]}: {p.reason}" for p in table.problems
    ]
    return "\n".join(sentences)


_STATUS = {"failed": "not finished", "skipped": "skipped"}


def _of_row(group: Group, row: Row) -> list[str]:
    if row.validity.verdict == "INVALID":
        return [f"{row.name()} is INVALID and says nothing: {'; '.join(row.validity.reasons)}."]
    if row.dense:
        return []
    base = next((r for r in group.rows if r.dense and r.mode == row.mode), None)
    gains = [_speed(row), _shrunk(row, base, "weights_bytes", "weights")]
    gains.append(_shrunk(row, base, "kv_bytes_per_token", "cache per token"))
    said = "; ".join(part for part in (*gains, _quality(row), _cost(row), _paid_back(row)) if part)
    return [f"{row.name()}: {said or 'nothing to compare'}{_reservations(row)}."]


def _reservations(row: Row) -> str:
    """Name what speaks against the numbers; the table says it in full."""
    codes = dict.fromkeys(reason.partition(":")[0] for reason in row.validity.reasons)
    return f" (with reservations: {', '.join(codes)})" if codes else ""


def _speed(row: Row) -> str:
    base, best = (row.cells[f"decode_ratio_to_{other}"] for other in ("baseline", "best_dense"))
    if row.cells["decode_tokens_per_s"].kind == "simulated":
        return "its saving is simulated, so it has no speed"
    if base.value is None:
        return ""
    words = _rate(base, f"the dense baseline in {row.mode} mode")
    if best.value is not None and best.value != base.value:
        words += f", and {_ratio(best)} against the best dense run{_aside(best)}"
    return words


def _rate(cell: Cell, other: str) -> str:
    verdict = None if cell.comparison is None else cell.comparison.verdict
    if verdict == "better":
        return f"decodes {_ratio(cell)} as fast as {other}"
    if verdict == "worse":
        return f"decodes slower than {other}: {_ratio(cell)} its rate"
    return f"decode rate {_ratio(cell)} that of {other}{_aside(cell)}"


def _aside(cell: Cell) -> str:
    """What a ratio is worth, in brackets; nothing where it is a shown difference."""
    found = cell.comparison
    if found is None or found.verdict in ("better", "worse"):
        return ""
    if not found.paired:
        return " (not measured side by side: no verdict)"
    if found.verdict == "same":
        return f" (the same within {found.factor:g}x)"
    return f" (inconclusive: {found.reason})"


def _ratio(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return f"{cell.value:.2f}x"
    return f"{cell.value:.2f}x [{cell.low:.2f}, {cell.high:.2f}]"


def _cost(row: Row) -> str:
    """What a million output tokens cost, as far as prices were given; two bills, never one sum."""
    rent, electricity, carbon = (
        _printed(row.cells[f"{key}_per_million_output_tokens"], style)
        for key, style in _COSTS.items()
    )
    _, factor = pue(row.prices)
    bills = [f"{rent} of rent"] if rent else []
    bills += [f"{electricity} of electricity ({factor})"] if electricity else []
    told = [" or ".join(bills)] if bills else []
    if carbon:
        told.append(f"{carbon} of CO2e" + ("" if electricity else f" ({factor})"))
    return f"a million output tokens take {', '.join(told)}" if told else ""


_COSTS: dict[str, Style] = {"rent": "money", "electricity": "money", "gco2e": "grams"}


def _printed(cell: Cell, style: Style) -> str:
    """A number without its footnote mark; nothing for none."""
    return "" if cell.value is None else text(replace(cell, note=None), style)


def _paid_back(row: Row) -> str:
    cell = row.cells["break_even_output_tokens_by_time"]
    if row.prices is None or cell.value is None:
        return ""
    aside = "" if cell.comparison is None else " (not measured side by side)"
    return f"compressing pays for its time after {count(cell.value)} output tokens{aside}"


def _shrunk(row: Row, base: Row | None, key: str, what: str) -> str:
    """Say by how much bytes shrank or grew; silent below one per cent."""
    mine = row.cells[key]
    theirs = base.cells[key] if base is not None else None
    if theirs is None or not mine.value or not theirs.value:
        return ""
    factor = theirs.value / mine.value
    if abs(factor - 1) < 0.01:
        return ""
    return f"{what} {factor:.1f}x smaller" if factor > 1 else f"{what} {1 / factor:.1f}x larger"


def _quality(row: Row) -> str:
    """Say what it costs in agreement with the dense model."""
    agreement, distance = row.cells["top1_agreement"], row.cells["kl_mean_nats"]
    if agreement.value is None or distance.value is None:
        return ""
    if agreement.value == 1.0 and distance.value == 0.0:
        return "predictions identical to the dense model's"
    changed = f"{100 * (1 - agreement.value):.1f} %"
    return (
        f"it prefers another next token in {changed} of positions "
        f"(KL {significant(distance.value, 2)} nats{_delta(row.cells['delta_nll_nats'])})"
    )


def _delta(cell: Cell) -> str:
    if cell.value is None:
        return ""
    return f", NLL {signed(cell.value, cell.stderr)}"
