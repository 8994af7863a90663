"""What is timed: an entry is one operation at one shape, its arms are ways to compute it.

An arm builds one call per copy of its weights or cache. Timing walks through all copies, so that
none is still in the GPU's second-level cache when its turn comes; copy 0 is the same data in every
arm, and its result is held against the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

OURS = "compresskit"


class Absent(Exception):
    """An arm that cannot run here, with the reason."""


def _itself(result: torch.Tensor) -> torch.Tensor:
    return result


@dataclass(frozen=True)
class Arm:
    """One way to compute an entry."""

    name: str
    build: Callable[[int], Sequence[Callable[[], Any]]]
    """Number of copies -> one call each; raises `Absent` with the reason."""
    moved_bytes: int
    """What one call has to move at least: weights or cache, inputs and outputs."""
    error_limit: float | None
    """Largest ‖y - expected‖ / ‖expected‖; None where the arm computes something else."""
    note: str = ""
    expected: Callable[[], torch.Tensor] | None = None
    """What it is held against, where that is not the entry's."""
    observe: Callable[[Any], torch.Tensor] = _itself
    """The numbers to compare, from what a call returns (and has written)."""


@dataclass(frozen=True)
class Entry:
    """One operation at one shape."""

    op: str
    shape: dict[str, int | str]
    expected: Callable[[], torch.Tensor]
    """The reference's result for copy 0."""
    arms: tuple[Arm, ...]
    baseline: str
    """Name of the arm that speed-ups are against."""
    resident: bool = False
    """Inputs are meant to lie in the cache (they come from the kernel before): nothing rotates."""

    @property
    def slug(self) -> str:
        """File name of the record."""
        return "-".join(f"{key}{value}" for key, value in self.shape.items())

    def without(self, names: Iterable[str]) -> Entry:
        """The entry less the arms whose names hold one of these words; ours and the baseline stay."""
        left_out = tuple(names)
        kept = [
            arm
            for arm in self.arms
            if arm.name.startswith(OURS)
            or arm.name == self.baseline
            or not any(word in arm.name for word in left_out)
        ]
        return replace(self, arms=tuple(kept))
