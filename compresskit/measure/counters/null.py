"""The counter of a machine without counters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Null:
    """Never reads; knows why."""

    why: str
    source: str = "none"
    scope: str = "none"

    def joules(self) -> float | None:
        """No reading, ever."""
        return None

    def reason(self) -> str:
        """Why there is no counter."""
        return self.why
