"""Choose a width for every part of a model under a budget of bits: a multiple-choice knapsack.

    cells of the budget   0 ......................................... budget
    after part 1          .   x       x     x                              x: least loss of a total
    after part 2          .       x   x  x  x x    x                          cost that can be had

One part after the other, the least loss of every total cost is kept, and which width led there; the
widths are then read backwards from the best. That is exact if the budget has at most `CELLS` cells
of the costs' greatest common divisor (so it is for models of regular shapes); otherwise costs are
rounded up to cells, and what is left over is below one cell a part.

Losses are made to fall with the width first (least squares, by pooling neighbours): a wider grid
that looks worse is noise of the measurement, and of equal losses the cheaper one is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compresskit.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

CELLS = 50_000
"""Resolution of the budget; tables of this length are kept for every part."""


class Option(NamedTuple):
    """A part at one width."""

    bits: int
    cost: int
    """Bits that its weights take in storage, scales included."""
    loss: float


@dataclass(frozen=True)
class Part:
    """Weights that get one width together."""

    name: str
    options: tuple[Option, ...]
    """From narrow to wide."""


class Choice(NamedTuple):
    """A width for every part."""

    bits: dict[str, int]
    cost: int
    loss: float
    """Sum over the parts, after the losses were made to fall with the width."""


def falling(losses: Sequence[float]) -> list[float]:
    """The nearest non-increasing sequence, in least squares (pool adjacent violators).

    >>> falling([4.0, 1.0, 2.0, 0.0])
    [4.0, 1.5, 1.5, 0.0]
    """
    pools: list[tuple[float, int]] = []
    for loss in losses:
        pools.append((loss, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (high, n), (low, m) = pools[-2:]
            pools[-2:] = [((high * n + low * m) / (n + m), n + m)]
    return [value for value, count in pools for _ in range(count)]


def choose(parts: Sequence[Part], budget: int) -> Choice:
    """Pick one option of every part, of least total loss, at a total cost of at most `budget`.

    Raises:
        SpecError: even the narrowest options cost more.
    """
    repaired = [_repaired(part) for part in parts]
    enough(budget, sum(part.options[0].cost for part in repaired))
    cell = _cell([option.cost for part in repaired for option in part.options], budget)
    room = budget // cell
    least = np.full(room + 1, np.inf)
    least[0] = 0.0
    came: list[NDArray[np.int64]] = []
    for part in repaired:
        tried = np.full((len(part.options), room + 1), np.inf)
        for row, option in zip(tried, part.options, strict=True):
            step = -(-option.cost // cell)
            if step <= room:
                row[step:] = least[: room + 1 - step] + option.loss
        came.append(tried.argmin(axis=0))
        least = tried.min(axis=0)
    if not np.isfinite(least).any():  # rounding up to cells left no room for the narrowest
        return _total(repaired, [0] * len(repaired))
    at, picked = int(least.argmin()), []
    for part, way in zip(reversed(repaired), reversed(came), strict=True):
        picked.append(int(way[at]))
        at -= -(-part.options[picked[-1]].cost // cell)
    return _total(repaired, picked[::-1])


def _cell(costs: Sequence[int], budget: int) -> int:
    """Bits of one cell."""
    common = math.gcd(*costs)
    return common if budget // common <= CELLS else max(1, budget // CELLS)


def _total(parts: Sequence[Part], picked: Sequence[int]) -> Choice:
    options = [part.options[index] for part, index in zip(parts, picked, strict=True)]
    return Choice(
        {part.name: option.bits for part, option in zip(parts, options, strict=True)},
        sum(option.cost for option in options),
        sum(option.loss for option in options),
    )


def enough(budget: float, least: float) -> None:
    """Refuse a budget below `least`, what the narrowest widths take (in the same unit).

    Raises:
        SpecError: it is.
    """
    if budget < least:
        raise SpecError(
            f"budget: {budget:g} bits are asked for, and the narrowest of the choices takes "
            f"{least:.6g}, scales included. Raise the budget, allow fewer bits, or enlarge the group."
        )


def _repaired(part: Part) -> Part:
    ordered = sorted(part.options, key=lambda option: (option.cost, option.bits))
    losses = falling([option.loss for option in ordered])
    return Part(
        part.name,
        tuple(o._replace(loss=loss) for o, loss in zip(ordered, losses, strict=True)),
    )


def widths(choice: Mapping[str, int]) -> dict[int, int]:
    """How many parts got each width, from narrow to wide."""
    found = sorted(choice.values())
    return {bits: found.count(bits) for bits in dict.fromkeys(found)}
