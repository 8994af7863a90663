"""What a stage is told, and how it knows whether there is time for more."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Deadline:
    """Says before each piece of work whether another one fits.

    The next piece is expected to last as long as the longest so far, so that a session of models is
    not begun which a limit outside would cut off. The first one is always begun while there is time.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin to count."""
        self._clock = clock
        self._began = clock()
        self._limit = 60 * minutes
        self._started: float | None = None
        self._longest = 0.0

    def left(self) -> float:
        """Seconds until the limit; negative beyond it."""
        return self._limit - (self._clock() - self._began)

    def fits(self) -> bool:
        """Whether to begin another piece; asking also says that the last one is over."""
        now = self._clock()
        if self._started is not None:
            self._longest = max(self._longest, now - self._started)
        go = self.left() > 0 and self._longest <= self.left()
        self._started = now if go else None
        return go


@dataclass(frozen=True)
class Job:
    """One stage of one visit."""

    out: Path
    """Folder of the records; the next visit goes on with what lies there."""
    minutes: float = 9.0
    """Nothing is begun that would not end by then."""
    is_dry: bool = False
    """A CPU, small sizes, no speeds that mean anything: every step but the GPU's."""
    models: tuple[str, ...] = ()
    """Instead of those of the stage."""
    without: tuple[str, ...] = ()
    """Peers to leave out."""
    resident: int | None = None
    """Rows measured side by side; the stage's own number by default."""
    deadline: Deadline = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "deadline", Deadline(self.minutes))
