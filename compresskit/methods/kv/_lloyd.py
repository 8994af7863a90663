"""Lloyd-Max quantisers: the levels that lose least of a distribution, in mean squared error.

    boundary    the middle between two neighbouring levels
    level       the mean of what lies between its boundaries

Each follows from the other; iterated in turn they settle, because neither half of a step can make
the error larger. `normal` does it with the integrals of the standard normal distribution, `fitted`
with sums over weighted samples (which is k-means on a line).

Papers: Max 1960, Quantizing for Minimum Distortion; Lloyd 1982, Least Squares Quantization in PCM.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SETTLED = 1e-12
"""Largest move of a level, in standard deviations, at which `normal` stops."""

ROUNDS = 200
"""Iterations of `fitted`: on a line, levels that still move after so many gain nothing."""


@cache
def normal(bits: int) -> tuple[float, ...]:
    """The 2^bits levels for the standard normal distribution, ascending."""
    count = 2**bits
    levels = [4 * (index + 0.5) / count - 2 for index in range(count)]
    moved = math.inf
    while moved > SETTLED:
        cuts = (-math.inf, *boundaries(levels), math.inf)
        better = [_mean(low, high) for low, high in pairwise(cuts)]
        moved = max(abs(a - b) for a, b in zip(levels, better, strict=True))
        levels = better
    # Exactly symmetric, which rounding would spoil in the last digits.
    return tuple((b - a) / 2 for a, b in zip(reversed(levels), levels, strict=True))


def boundaries(levels: Sequence[float]) -> list[float]:
    """The middles between neighbouring levels."""
    return [(low + high) / 2 for low, high in pairwise(levels)]


def _mean(low: float, high: float) -> float:
    """Mean of a standard normal variable, given that it lies between two cuts."""
    return (_density(low) - _density(high)) / (_below(high) - _below(low))


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the level nearest to each number: int64 like `x`; levels `[n]`, ascending."""
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)


def fitted(samples: torch.Tensor, weights: torch.Tensor, bits: int) -> torch.Tensor:
    """The 2^bits levels, float32 ascending, that lose least of weighted `samples` `[n]`.

    The error is sum_i weights[i] * (samples[i] - nearest level)^2. Found from two starts, evenly
    spaced levels and quantiles, of which the better end is returned: it is a local minimum.
    """
    x, order = samples.double().sort()
    w = weights.double()[order]
    one = x.new_zeros(1)
    mass = torch.cat((one, w.cumsum(0)))
    moment = torch.cat((one, (w * x).cumsum(0)))
    at = (torch.arange(2**bits, device=x.device) + 0.5) / 2**bits
    starts = x[0] + (x[-1] - x[0]) * at, x[(at * len(x)).long()]
    ends = [_settle(start.double(), x, mass, moment) for start in starts]
    return min(ends, key=lambda levels: _loss(levels, x, w)).float()


def _settle(
    levels: torch.Tensor, x: torch.Tensor, mass: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    """Iterate from `levels`; sums over a cell are differences of the running sums."""
    for _ in range(ROUNDS):
        inner = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        cuts = torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), len(x))))
        inside = mass[cuts].diff()
        # A level that nothing is nearest to stays where it is.
        means = moment[cuts].diff() / inside
        better = torch.where(inside > 0, means, levels).sort().values
        if torch.equal(better, levels):
            break
        levels = better
    return levels


def _loss(levels: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    return float((w * (x - levels[nearest(x, levels)]).square()).sum())
