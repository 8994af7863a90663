"""Choose a width for every part of a model under a budget of bits: a multiple-choice knapsack.

    loss |x            each part starts at its narrowest width; the step with the most loss saved
         | \\           per bit is taken again and again while it fits. Steps go along the lower
         |  x--.       hull (x) of a part's points, which makes the order of steps that of a falling
         |    o `--x   Lagrange multiplier: the result is the best one of its own cost, and what
         +--------- bits   is left of the budget is less than one step.

Losses are made to fall with the width first (least squares, by pooling neighbours): a wider grid
that looks worse is noise of the measurement. Equal gains go to the part that comes first, so the
result is the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from compresskit.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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
    least = sum(part.options[0].cost for part in repaired)
    enough(budget, least)
    at = [0] * len(repaired)
    left = budget - least
    while True:
        best: tuple[float, int, int] | None = None
        for index, part in enumerate(repaired):
            step = _step(part.options, at[index], left)
            if step is not None and (best is None or step[0] > best[0]):
                best = (step[0], index, step[1])
        if best is None:
            break
        _, index, to = best
        left -= repaired[index].options[to].cost - repaired[index].options[at[index]].cost
        at[index] = to
    picked = [part.options[place] for part, place in zip(repaired, at, strict=True)]
    return Choice(
        {part.name: option.bits for part, option in zip(repaired, picked, strict=True)},
        sum(option.cost for option in picked),
        sum(option.loss for option in picked),
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


def _step(options: Sequence[Option], at: int, room: int) -> tuple[float, int] | None:
    """The steepest way down from `at` that fits into `room`: loss saved per bit, and where to."""
    here = options[at]
    best: tuple[float, int] | None = None
    for to in range(at + 1, len(options)):
        cost, saved = options[to].cost - here.cost, here.loss - options[to].loss
        if 0 < cost <= room and saved > 0 and (best is None or saved / cost > best[0]):
            best = (saved / cost, to)
    return best


def widths(choice: Mapping[str, int]) -> dict[int, int]:
    """How many parts got each width, from narrow to wide."""
    found = sorted(choice.values())
    return {bits: found.count(bits) for bits in dict.fromkeys(found)}
