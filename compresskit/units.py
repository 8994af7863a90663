"""Units of the numbers in a record, and the only place that knows prefixes.

Inside the project every quantity is in its SI base unit (seconds, bytes, joules); a prefix is
chosen when the number is printed.

>>> format_quantity(0.0123, Unit.SECOND)
'12.3 ms'
>>> format_quantity(269_060_552, Unit.BYTE)
'269 MB'
"""

from __future__ import annotations

from enum import StrEnum


class Unit(StrEnum):
    """Unit of a stored number."""

    SECOND = "s"
    BYTE = "B"
    BYTE_PER_TOKEN = "B/token"
    JOULE = "J"
    JOULE_PER_TOKEN = "J/token"
    WATT = "W"
    TOKEN = "token"
    TOKEN_PER_SECOND = "token/s"
    NAT = "nat"
    BIT_PER_BYTE = "bit/byte"
    BIT = "bit"
    BYTE_PER_SECOND = "B/s"
    FLOP_PER_SECOND = "FLOP/s"
    CURRENCY_PER_MTOK = "currency/Mtok"
    GRAM_PER_MTOK = "gCO2e/Mtok"
    KWH_PER_MTOK = "kWh/Mtok"
    TOKEN_PER_KWH = "token/kWh"
    RATIO = "ratio"
    COUNT = "count"


_SCALED = {
    Unit.SECOND,
    Unit.JOULE,
    Unit.WATT,
    Unit.JOULE_PER_TOKEN,
    Unit.BYTE_PER_SECOND,
    Unit.FLOP_PER_SECOND,
}
_PREFIXES = (
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
    (1e-9, "n"),
)


_MULTIPLES = {"": 1, "B": 1}
_MULTIPLES |= {f"{prefix}B": 10 ** (3 * n) for n, prefix in enumerate("KMGT", start=1)}
_MULTIPLES |= {f"{prefix}IB": 1024**n for n, prefix in enumerate("KMGT", start=1)}


def parse_bytes(text: str) -> int:
    """Read a number of bytes: plain, with a decimal prefix (MB) or a binary one (MiB).

    >>> [parse_bytes(text) for text in ("4096", "64 MB", "1.5GiB")]
    [4096, 64000000, 1610612736]

    Raises:
        ValueError: it is none.
    """
    number = text.rstrip("BbIiKkMmGgTt ")
    unit = text[len(number) :].strip().upper()
    try:
        size = float(number) * _MULTIPLES[unit]
        return int(size)
    except (ValueError, KeyError, OverflowError):
        raise ValueError(
            f"{text!r} is no number of bytes; write it as 4096, 64MB or 1GiB"
        ) from None


def significant(value: float, digits: int = 3) -> str:
    """Print `value` with `digits` significant digits and no exponent where it can be read without.

    >>> [significant(v) for v in (0.0, 12.345, 1234.5, 0.00123)]
    ['0', '12.3', '1234', '0.00123']
    """
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:.0f}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".")


def format_quantity(value: float, unit: Unit, digits: int = 3) -> str:
    """Print a number with a readable prefix: milliseconds below a second, megabytes (10^6 B) above."""
    if unit in (Unit.BYTE, Unit.BYTE_PER_TOKEN):
        for factor, prefix in _PREFIXES[:5]:
            if abs(value) >= factor or factor == 1.0:
                return f"{significant(value / factor, digits)} {prefix}{unit.value}"
    if unit in _SCALED and value != 0:
        for factor, prefix in _PREFIXES:
            if abs(value) >= factor:
                return f"{significant(value / factor, digits)} {prefix}{unit.value}"
    if unit in (Unit.RATIO, Unit.COUNT):
        return significant(value, digits)
    return f"{significant(value, digits)} {unit.value}"
