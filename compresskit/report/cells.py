"""One cell of a table: a number with its kind, or why there is none.

A renderer prints `text(cell, style)`; nothing else turns numbers into words. An unknown number is
`n/a` with a footnote, never 0; an estimate wears a tilde; a simulated saving has no speed; a ratio
wears the mark of its verdict, or of having none.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from compresskit.record import Estimated, Unavailable
from compresskit.units import Unit, format_quantity, significant

if TYPE_CHECKING:
    from compresskit.record import Reading
    from compresskit.stats import Word

Kind = Literal[
    "measured", "estimated", "derived", "unavailable", "simulated", "invalid", "reference"
]
Style = Literal[
    "plain",
    "quantity",
    "percent",
    "share",
    "signed",
    "ratio",
    "money",
    "grams",
    "count",
    "words",
    "spread",
    "duration",
]

MARKS = MappingProxyType({"better": "▲", "worse": "▼", "same": "=", "inconclusive": "?"})
"""A verdict in one character, behind the ratio that it is about."""
UNPAIRED = "†"


@dataclass(frozen=True)
class Comparison:
    """What a ratio rests on."""

    paired: bool
    """Both sides were measured side by side; otherwise there is no verdict."""
    verdict: Word | None = None
    p: float | None = None
    n: int | None = None
    """Pairs."""
    factor: float | None = None
    """The practical factor that the verdict asked for."""
    reason: str = ""
    """Why the verdict is inconclusive."""

    def mark(self) -> str:
        """The character behind the ratio."""
        return UNPAIRED if self.verdict is None else f" {MARKS[self.verdict]}"


@dataclass(frozen=True)
class Cell:
    """A value with its unit, spread and kind, or words; `note` is the number of a footnote."""

    kind: Kind
    value: float | None = None
    unit: Unit | None = None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    reason: str = ""
    note: int | None = None
    remark: str = ""
    """A sentence that belongs under the table although there is a value."""
    words: str = ""
    """What stands in a cell that holds no number."""
    currency: str = ""
    provenance: str = ""
    """Of an energy: measured_counter, measured_integrated or estimated."""
    scope: str = ""
    """Of an energy: what the counter covers."""
    comparison: Comparison | None = None


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
    if cell.words:
        return f"{cell.words}{superscript(cell.note)}"
    if cell.value is None:
        return f"n/a{superscript(cell.note)}"
    tilde = "~" if cell.kind == "estimated" else ""
    return f"{tilde}{_number(cell, cell.value, style)}{superscript(cell.note)}"


def _number(cell: Cell, value: float, style: Style) -> str:
    if style == "percent":
        return f"{100 * value:.2f} %"
    if style == "share":
        return f"{100 * value:.0f} %"
    if style == "ratio":
        return _ratio(cell, value)
    if style == "money":
        return f"{significant(value)} {cell.currency}"
    if style == "grams":
        return f"{significant(value)} g"
    if style == "count":
        return f"{count(value)}{_mark(cell)}"
    if style == "signed":
        return signed(value, cell.stderr)
    if style == "duration":
        return duration(value)
    if style == "spread":
        error = f" ± {significant(cell.stderr, 2)}" if cell.stderr else ""
        return f"{significant(value)}{error}"
    if style == "quantity" and cell.unit is not None:
        # The denominator stands in the heading.
        short = {Unit.BYTE_PER_TOKEN: Unit.BYTE, Unit.JOULE_PER_TOKEN: Unit.JOULE}
        return _with_error(format_quantity(value, short.get(cell.unit, cell.unit)), cell)
    return significant(value)


def _with_error(shown: str, cell: Cell) -> str:
    """Set the standard error, where there is one, between a printed number and its unit."""
    number, _, unit = shown.rpartition(" ")
    if not cell.stderr or not cell.value:
        return shown
    error = cell.stderr / cell.value * float(number)
    return f"{number} ± {significant(error, 2)} {unit}"


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
    mark = _mark(cell)
    if cell.low is None or cell.high is None:
        return f"{value:.2f}{mark}"
    return f"{value:.2f} [{cell.low:.2f}, {cell.high:.2f}]{mark}"


def _mark(cell: Cell) -> str:
    return "" if cell.comparison is None else cell.comparison.mark()


def count(value: float) -> str:
    """Print a number of things with a readable prefix.

    >>> [count(v) for v in (0.0, 12.0, 1234.0, 5_600_000.0)]
    ['0', '12', '1.23 k', '5.60 M']
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{significant(value / factor)} {prefix}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Print a long time in what people count it in.

    >>> [duration(v) for v in (7.25, 150.0, 2700.0, 36_000.0)]
    ['7.25 s', '2.50 min', '45.0 min', '10.0 h']
    """
    for size, name in ((7200.0, "h"), (120.0, "min")):
        if seconds >= size:
            return f"{significant(seconds / {'h': 3600.0, 'min': 60.0}[name])} {name}"
    return f"{significant(seconds)} s"


def superscript(number: int | None) -> str:
    """The mark of a footnote."""
    if number is None:
        return ""
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
