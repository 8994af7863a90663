"""What an energy counter is: cumulated joules per device, read at the edges of a window.

To add one, subclass `AbstractCounter` in a file of its own, open it with a function that returns
the counter or a sentence saying why there is none, and list that function in `find`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class AbstractCounter(ABC):
    """Energy of one scope. A reading that fails is None; `reason` then says why."""

    source: str
    """Name of the counter, as a reading shows it; a power integral ends in `_integral`."""
    scope: str
    """What it covers: gpu, package, soc ..."""
    devices: tuple[str, ...] = ()
    """Hashed identifiers, in the order of `parts`."""
    cumulates: bool = True
    """False where there is only a power sensor, whose readings have to be integrated."""
    poll_every: float | None = None
    """Seconds within which `parts` must be read again, or a wraparound is missed."""
    highest_watts: float | None = None
    """A mean power above this cannot be: the counter was reset."""

    @abstractmethod
    def parts(self) -> tuple[float, ...] | None:
        """Joules per device since an arbitrary origin."""

    @abstractmethod
    def reason(self) -> str:
        """Why there is no reading."""

    def answers(self) -> bool:
        """Whether there is a reading just now."""
        return self.parts() is not None

    def total(self, deltas: Sequence[float]) -> float:
        """Joules of a window from the joules of each device in it."""
        return sum(deltas)

    def apart(self) -> dict[str, float]:
        """Cumulated joules of domains that are shown beside the total, never in it."""
        return {}

    def watts(self) -> float | None:
        """Power of all devices now, from a sensor of its own."""
        return None
