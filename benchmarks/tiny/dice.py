"""Seeded choices that give the same text on every Python version.

`random.Random.random()` is the only draw whose sequence Python promises to keep, so every choice
below is made from it alone; `choice`, `sample` and `shuffle` may change between versions.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


class Dice:
    """A stream of choices fixed by one integer."""

    def __init__(self, seed: int) -> None:
        """Start the stream of `seed`."""
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self._random() < probability

    def number(self, low: int, high: int) -> int:
        """Return a whole number in [low, high], all equally likely."""
        return low + int(self._random() * (high - low + 1))

    def even(self, items: Sequence[T]) -> T:
        """Return one of `items`, all equally likely."""
        return items[int(self._random() * len(items))]

    def pick(self, items: Sequence[T]) -> T:
        """Return one of `items`, earlier ones more often (weights 1/1.5, 1/2.5, 1/3.5, ...).

        The skew gives every choice a clear most likely outcome. With even choices the greedy token
        of two models would differ by noise alone, and a draft could never agree with its target.
        """
        weights = [1.0 / (rank + 1.5) for rank in range(len(items))]
        point = self._random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            point -= weight
            if point < 0.0:
                return item
        return items[-1]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different ones of `items` in random order."""
        rest = list(items)
        return [rest.pop(int(self._random() * len(rest))) for _ in range(count)]

    def weighted(self, weights: dict[str, float]) -> str:
        """Return a key of `weights` with probability proportional to its value."""
        point = self._random() * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0.0:
                return key
        return next(reversed(weights))
