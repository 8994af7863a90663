"""Seeded choices that are the same on every Python version.

Of the `random` module only the sequence of `random()` is promised, so all choices are made from it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


class Dice:
    """A stream of choices fixed by what it is seeded with."""

    def __init__(self, *seed: str | int) -> None:
        """Start the stream of these words and numbers."""
        self._random = random.Random("/".join(map(str, seed))).random

    def share(self) -> float:
        """A number from [0, 1)."""
        return self._random()

    def number(self, low: int, high: int) -> int:
        """A whole number from [low, high]."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[int(self._random() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different ones of `items`, in random order; at most all of them."""
        rest = list(items)
        return [rest.pop(int(self._random() * len(rest))) for _ in range(min(count, len(rest)))]
