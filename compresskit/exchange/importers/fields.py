"""Careful reading of documents that others wrote: wrong content is one sentence, never a traceback."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from pydantic_core import from_json

from compresskit.errors import RecordError
from compresskit.exchange.peers import File, unit_of
from compresskit.record import Measured

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LONGEST_TEXT = 200
"""Characters of a name from a foreign file that are kept."""
SMALLEST, LARGEST = 1e-18, 1e18
"""Nothing that these tools time or count lies outside; products of such numbers never overflow."""


class Source(NamedTuple):
    """The bytes of a file and what it is called."""

    name: str
    data: bytes
    sha256: str

    def file(self, entry: int) -> File:
        """Where the result number `entry` was read from."""
        return File(name=clean(self.name), sha256=self.sha256, entry=entry)


def clean(words: str) -> str:
    """Keep a name printable: control characters would steer the reader's terminal."""
    kept = "".join(c if c.isprintable() else " " for c in words)
    return " ".join(kept.split())[:LONGEST_TEXT]


def documents(source: Source) -> list[Fields]:
    """Return the JSON objects of a file: one object, a list of them, or one a line.

    Raises:
        RecordError: it holds something else, or NaN or Infinity.
    """
    try:
        found = from_json(source.data, allow_inf_nan=False)
    except ValueError as whole:
        lines = [line for line in source.data.splitlines() if line.strip()]
        try:
            found = [from_json(line, allow_inf_nan=False) for line in lines]
        except ValueError:
            raise RecordError(f"{source.name}: not JSON ({whole}).") from None
    entries = found if isinstance(found, list) else [found]
    if not all(isinstance(one, dict) for one in entries):
        raise RecordError(f"{source.name}: a JSON object per result was expected.")
    where = source.name if len(entries) == 1 else f"{source.name}: result {{}}"
    return [Fields(one, where.format(index)) for index, one in enumerate(entries)]


@dataclass(frozen=True)
class Fields:
    """A JSON object and where it stands. Absent and null are the same: None."""

    document: dict[str, Any]
    where: str

    def wrong(self, what: str) -> RecordError:
        """The error for something that cannot be so."""
        return RecordError(f"{self.where}: {what}.")

    def number(self, key: str) -> float | None:
        """A finite number that is not negative."""
        value = self.document.get(key)
        return None if value is None else self._number(value, key)

    def positive(self, key: str) -> float | None:
        """A number above zero: a duration, a rate, a count of something that was done."""
        value = self.number(key)
        if value is not None and value <= 0:
            raise self.wrong(f"{key} is {value:g}; it must be above zero")
        return value

    def whole(self, key: str) -> int | None:
        """A whole number that is not negative."""
        value = self.number(key)
        if value is not None and not value.is_integer():
            raise self.wrong(f"{key} is {value:g}; a whole number was expected")
        return None if value is None else int(value)

    def score(self, key: str) -> float | None:
        """Any finite number; None where there is none, or something else than a number."""
        value = self.document.get(key)
        return None if isinstance(value, bool) or not _fits(value) else float(value)

    def numbers(self, key: str) -> list[float] | None:
        """A list of finite numbers that are not negative."""
        values = self.document.get(key)
        if values is None:
            return None
        if not isinstance(values, list):
            raise self.wrong(f"{key} is no list")
        return [self._number(value, f"{key}.{index}") for index, value in enumerate(values)]

    def text(self, key: str) -> str | None:
        """A printable name; None where it is empty."""
        value = self.document.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(f"{key} is no text")
        return clean(value) or None

    def part(self, key: str) -> Fields:
        """A nested object; an absent one is empty."""
        value = self.document.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.wrong(f"{key} is no object")
        return Fields(value, f"{self.where}: {key}")

    def context(self, keys: Iterable[str]) -> dict[str, str | int | float | bool]:
        """Facts to keep as they are: plain values only."""
        kept: dict[str, str | int | float | bool] = {}
        for key in keys:
            value = self.document.get(key)
            if isinstance(value, str):
                kept[key] = clean(value)
            elif isinstance(value, bool) or _fits(value):
                kept[key] = value
        return kept

    def require(self, *keys: str, tool: str) -> None:
        """Refuse a document that lacks what every file of `tool` has."""
        missing = [key for key in keys if self.document.get(key) is None]
        if missing:
            raise self.wrong(f"{', '.join(missing)} is missing; this is no result of {tool}")

    def agree(self, stated: float | None, found: float | None, what: str) -> None:
        """Refuse two numbers of one file that contradict each other by more than one per cent."""
        if (
            stated is not None
            and found is not None
            and not math.isclose(stated, found, rel_tol=0.01)
        ):
            raise self.wrong(f"{what} is {stated:g}, but its raw numbers give {found:g}")

    def _number(self, value: object, key: str) -> float:
        if isinstance(value, bool) or not _fits(value):
            raise self.wrong(f"{key} is no finite number")
        if value < 0:
            raise self.wrong(f"{key} is negative")
        if value and not SMALLEST <= value <= LARGEST:
            raise self.wrong(f"{key} is {value:g}, which nothing can measure")
        return float(value)


def _fits(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a number that a float can hold."""
    if not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def measured(name: str, value: float, how: str) -> Measured:
    """A reading under one of our names; `how` says where it stood, tool first."""
    return Measured(value=value, unit=unit_of(name), source=f"imported: {how}")


def middle(values: Sequence[float]) -> float:
    """Median of at least one value."""
    return float(median(values))
