"""What a training tells whoever watches it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from compresskit.card import Check


class Stride(NamedTuple):
    """One step, as it is shown and as a line of curve.jsonl."""

    step: int
    """From 1."""
    tokens: int
    """Learned from so far."""
    loss: float
    """Weighted mean over the step's tokens, in nats where the terms are."""
    parts: dict[str, float]
    """The terms by themselves, without their weights."""
    rate: float
    norm: float
    """Length of the gradient before it was clipped."""
    spent: float
    """Share of the budget used up before the step."""
    seconds: float
    """Since the training began, over all sittings."""


class Watcher(Protocol):
    """Told what is going on; the command line draws it."""

    def phase(self, text: str) -> None:
        """Something begins that is no step."""

    def step(self, stride: Stride) -> None:
        """A step is done."""

    def look(self, check: Check) -> None:
        """The held-out text was scored."""


class Silent:
    """Tells nobody."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def step(self, stride: Stride) -> None:
        """Nothing."""

    def look(self, check: Check) -> None:
        """Nothing."""
