"""What a line of the table of checks is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskit.compare.outcome import Outcome, Tier
from compresskit.compare.two import Two

if TYPE_CHECKING:
    from compresskit.compare.agree import Key
    from compresskit.metrics import Better
    from compresskit.units import Unit

Judge = Callable[["Check", Two, float | None], Outcome | None]
"""(check, both records, tolerance) -> outcome; None where neither record has such a number."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    tier: Tier
    better: Better
    """`none`: any difference counts."""
    judge: Judge
    unit: Unit | None = None
    tolerance: float | None = None
    """A difference (quality) or a factor (clocks)."""
    needs: tuple[Key, ...] = ()
    """What must agree, beyond what every comparison asks for."""
    look: str = ""
    """Where to look when this fails."""
