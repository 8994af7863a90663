"""What a comparison says: one outcome per record and metric, and what could not be compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.record import Record
    from compresskit.stats import Interval
    from compresskit.units import Unit

Tier = Literal["exact", "quality", "clocks"]
TIERS: tuple[Tier, ...] = ("exact", "quality", "clocks")

Word = Literal["better", "same", "worse", "changed", "inconclusive", "not compared"]
FAILING: frozenset[Word] = frozenset({"worse", "changed"})
"""`changed`: neither better nor worse, but not what it was (an output, a kernel)."""


@dataclass(frozen=True)
class Outcome:
    """One metric of one record against the same metric of another."""

    tier: Tier
    metric: str
    word: Word
    unit: Unit | None = None
    base: float | str | None = None
    new: float | str | None = None
    ratio: Interval | None = None
    """New over base, 95 % interval; of the clocks."""
    delta: Interval | None = None
    """New minus base, 95 % interval over paired windows; of the quality."""
    tolerance: float | None = None
    """The factor (clocks) or difference (quality) that was allowed."""
    p: float | None = None
    n_base: int | None = None
    n_new: int | None = None
    reason: str = ""
    """What differs, or why there is no verdict."""
    look: str = ""
    """Where to look when this fails."""

    @property
    def failed(self) -> bool:
        """It got worse, or is not what it was."""
        return self.word in FAILING


@dataclass(frozen=True)
class Row:
    """Two records that were compared."""

    base: Record
    new: Record
    outcomes: tuple[Outcome, ...]

    @property
    def label(self) -> str:
        """The stack and the decode mode; of records compared as given, those of both."""
        if self.base.digest == self.new.digest:
            return _name(self.new)
        return f"{_name(self.new)} against {_name(self.base)}"


def _name(record: Record) -> str:
    """The stack, and the decode mode unless it is eager or said already."""
    mode = f" ({record.spec.engine.mode})"
    return record.label if mode in (" (eager)", record.label[-len(mode) :]) else record.label + mode


@dataclass(frozen=True)
class Refusal:
    """Two records that must not be compared, or one that no comparison may use."""

    label: str
    digest: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """The whole of it, in the order of the new records."""

    rows: tuple[Row, ...]
    only_base: tuple[Record, ...] = ()
    only_new: tuple[Record, ...] = ()
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    def outcomes(self) -> Iterator[tuple[Row, Outcome]]:
        """Every outcome with its row."""
        for row in self.rows:
            for outcome in row.outcomes:
                yield row, outcome

    def failures(self) -> list[tuple[Row, Outcome]]:
        """What got worse or changed."""
        return [(row, outcome) for row, outcome in self.outcomes() if outcome.failed]

    def counts(self) -> dict[str, int]:
        """How often each verdict was given."""
        return dict(Counter(outcome.word for _, outcome in self.outcomes()))
