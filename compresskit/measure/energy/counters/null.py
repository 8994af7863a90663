"""The counter of a machine without counters."""

from __future__ import annotations

from typing import final

from compresskit.measure.energy.counters.protocol import AbstractCounter


@final
class Null(AbstractCounter):
    """Never reads; knows why."""

    source = "none"
    scope = "none"

    def __init__(self, why: str) -> None:
        """Remember the reason."""
        self.why = why

    def parts(self) -> tuple[float, ...] | None:
        """No reading, ever."""
        return None

    def reason(self) -> str:
        """Why there is no counter."""
        return self.why
