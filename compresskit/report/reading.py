"""A table in plain words: one sentence per run, and nothing that the numbers do not carry.

The runs are not paired, so there is a ratio and its interval; a word such as "faster" is used only
where the interval leaves 1 out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.report.cells import signed
from compresskit.units import significant

if TYPE_CHECKING:
    from compresskit.report.cells import Cell
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
    said = "; ".join(part for part in (*gains, _quality(row)) if part)
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
        words += f", and {_ratio(best)} against the best dense run"
    return words


def _rate(cell: Cell, other: str) -> str:
    if cell.low is None or cell.high is None:
        return f"decode rate {_ratio(cell)} that of {other} (too few repetitions for an interval)"
    if cell.low <= 1 <= cell.high:
        return f"decode rate {_ratio(cell)} that of {other} (no difference shown)"
    if cell.low > 1:
        return f"decodes {_ratio(cell)} as fast as {other}"
    return f"decodes slower than {other}: {_ratio(cell)} its rate"


def _ratio(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return f"{cell.value:.2f}x"
    return f"{cell.value:.2f}x [{cell.low:.2f}, {cell.high:.2f}]"


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
