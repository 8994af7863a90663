"""One cell of a table: a number with its kind, or why there is none.

A renderer prints `text(cell, style)`; nothing else turns numbers into words. An unknown number is
`n/a` with a footnote, never 0; an estimate wears a tilde; a simulated saving has no speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compresskit.record import Estimated, Unavailable
from compresskit.units import Unit, format_quantity, significant

if TYPE_CHECKING:
    from compresskit.record import Reading

Kind = Literal["measured", "estimated", "unavailable", "simulated", "invalid", "reference"]
Style = Literal["plain", "quantity", "percent", "signed", "ratio"]


@dataclass(frozen=True)
class Cell:
    """A value with its unit, spread and kind; `note` is the number of a footnote."""

    kind: Kind
    value: float | None = None
    unit: Unit | None = None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    reason: str = ""
    note: int | None = None


INVALID = Cell("invalid", reason="the record is INVALID")
SIMULATED = Cell("simulated", reason="the saving is simulated: its speed means nothing")
REFERENCE = Cell("reference", reason="is what the others are compared with")


def of_reading(reading: Reading, *, stderr: float | None = None) -> Cell:
    """Make a cell of a reading."""
    if isinstance(reading, Unavailable):
        return Cell("unavailable", reason=reading.reason)
    if isinstance(reading, Estimated):
        return Cell("estimated", reading.value, reading.unit, reason=reading.model)
    return Cell("measured", reading.value, reading.unit, stderr=stderr)


def text(cell: Cell, style: Style) -> str:
    """Print a cell, footnote mark included."""
    if cell.kind == "reference":
        return "–"
    if cell.kind in ("simulated", "invalid"):
        return cell.kind
    if cell.value is None:
        return f"n/a{superscript(cell.note)}"
    tilde = "~" if cell.kind == "estimated" else ""
    return f"{tilde}{_number(cell, cell.value, style)}{superscript(cell.note)}"


def _number(cell: Cell, value: float, style: Style) -> str:
    if style == "percent":
        return f"{100 * value:.2f} %"
    if style == "ratio":
        return _ratio(cell, value)
    if style == "signed":
        return signed(value, cell.stderr)
    if style == "quantity" and cell.unit is not None:
        # The denominator stands in the heading.
        short = {Unit.BYTE_PER_TOKEN: Unit.BYTE, Unit.JOULE_PER_TOKEN: Unit.JOULE}
        return format_quantity(value, short.get(cell.unit, cell.unit))
    return significant(value)


def signed(value: float, stderr: float | None) -> str:
    """Print a difference, to the decimals that its standard error allows.

    >>> signed(0.0020041, 0.00098), signed(-1.5, None)
    ('+0.00200 ± 0.00098', '-1.50')
    """
    sign = "+" if value > 0 else ""
    if not stderr:
        return f"{sign}{significant(value)}" + ("" if stderr is None else " ± 0")
    spread = significant(stderr, 2)
    decimals = len(spread.partition(".")[2])
    number = significant(value) if "e" in spread else f"{value:.{decimals}f}"
    return f"{sign}{number} ± {spread}"


def _ratio(cell: Cell, value: float) -> str:
    if cell.low is None or cell.high is None:
        return f"{value:.2f}"
    return f"{value:.2f} [{cell.low:.2f}, {cell.high:.2f}]"


def superscript(number: int | None) -> str:
    """The mark of a footnote."""
    if number is None:
        return ""
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
