"""Exact tests: how often chance alone would look like this.

Everything is counted with numpy or whole numbers: importing scipy takes longer than comparing two
suites. scipy is the oracle of the tests instead.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from compresskit.stats.resample import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_COUNTABLE = 50_000_000
"""Additions that a count may take (about 20 ms): 60 values a side without ties."""


def mann_whitney(
    one: Sequence[float] | NDArray[np.float64], other: Sequence[float] | NDArray[np.float64]
) -> float:
    """Two-sided exact p of the Mann-Whitney U test (Mann and Whitney 1947), ties included.

    Under chance every choice of `len(one)` of the pooled mid-ranks is equally likely; the sums of
    all choices are counted, and p is twice the smaller tail (1 at most). Beyond some 60 values a
    side the tie-corrected normal approximation with continuity correction takes over; in the tails
    it errs towards a larger p.

    Raises:
        ValueError: a side is empty or holds a value that is not finite.
    """
    a, b = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if not a.size or not b.size:
        raise ValueError("the Mann-Whitney test needs values on both sides")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the Mann-Whitney test needs finite values")
    if a.size > b.size:
        a, b = b, a  # the smaller side has the fewer choices
    values, counts = np.unique(np.concatenate([a, b]), return_counts=True)
    ends = np.cumsum(counts)
    # The mid-rank of each distinct value, doubled where ties make halves.
    scale = 2 if (counts % 2 == 0).any() else 1
    middles = scale * (2 * ends - counts + 1) // 2
    seen = int(middles[np.searchsorted(values, a)].sum())
    ranks = tuple(np.repeat(middles, counts).tolist())
    if len(ranks) * a.size * sum(ranks[-a.size :]) > _COUNTABLE:
        return _approximate(seen / scale, a.size, b.size, counts)
    below = _at_most(ranks, a.size)
    tails = below[seen], below[-1] - below[seen - 1]
    return float(min(1.0, 2 * min(tails) / below[-1]))


@functools.lru_cache(maxsize=512)
def _at_most(ranks: tuple[int, ...], size: int) -> NDArray[np.float64]:
    """Entry s: how many choices of `size` of the `ranks` have a sum of at most s.

    One rank after the other joins or does not (the shift algorithm of Streitberg and Roehmel 1986).
    Counts are floats: exact up to 2^53, and nothing but additions, so close beyond it.
    """
    ways = np.zeros((size + 1, sum(ranks[-size:]) + 1))
    ways[0, 0] = 1
    for taken, rank in enumerate(ranks):
        most = min(size, taken + 1)
        # The right side is copied first: each rank joins once.
        ways[1 : most + 1, rank:] += ways[:most, : ways.shape[1] - rank].copy()
    return np.cumsum(ways[size])


def _approximate(rank_sum: float, one: int, other: int, ties: NDArray[np.intp]) -> float:
    total = one + other
    shared = float((ties.astype(float) ** 3 - ties).sum()) / (total * (total - 1))
    spread = math.sqrt(one * other / 12 * (total + 1 - shared))
    distance = max(0.0, abs(rank_sum - one * (total + 1) / 2) - 0.5)
    return 1.0 if spread == 0 else math.erfc(distance / spread / math.sqrt(2))


def signed_rank(
    one: Sequence[float] | NDArray[np.float64], other: Sequence[float] | NDArray[np.float64]
) -> float:
    """Two-sided exact p of Wilcoxon's signed-rank test (1945) on the log ratios of pairs.

    What a round did to both sides is gone from their ratio, so this test sees a difference through
    a load that comes and goes, to which `mann_whitney` is blind. Under chance every pattern of
    signs is equally likely; they are counted by rank sum. Equal pairs say nothing and are left
    out. Its smallest p is 2 / 2^n: ten pairs for p < 0.002.

    Raises:
        ValueError: no pairs, sides of unlike length, or a value that is not a positive number.
    """
    a, b = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if not a.size or a.size != b.size:
        raise ValueError("the signed-rank test needs pairs")
    if not ((a > 0) & (b > 0) & np.isfinite(a) & np.isfinite(b)).all():
        raise ValueError("the signed-rank test needs positive values")
    logs = np.log(a) - np.log(b)
    logs = logs[logs != 0]
    if not logs.size:
        return 1.0
    _, places, counts = np.unique(np.abs(logs), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(counts) - counts + 1)[places.reshape(-1)]  # mid-ranks, twice
    below = _signs_at_most(tuple(np.sort(doubled).tolist()))
    seen = int(doubled[logs > 0].sum())
    tails = below[seen], below[-1] - (below[seen - 1] if seen else 0)
    return float(min(1.0, 2 * min(tails) / below[-1]))


@functools.lru_cache(maxsize=64)
def _signs_at_most(ranks: tuple[int, ...]) -> NDArray[np.float64]:
    """Entry s: how many choices of any of the `ranks` have a sum of at most s."""
    ways = np.zeros(sum(ranks) + 1)
    ways[0] = 1
    for rank in ranks:
        ways[rank:] += ways[: ways.size - rank].copy()
    return np.cumsum(ways)


def smallest_p(one: int, other: int) -> float:
    """Smallest p that `mann_whitney` can return for these numbers of values: 2 / C(m + n, m)."""
    return min(1.0, 2 / math.comb(one + other, one))


def fewest_a_side(alpha: float) -> int:
    """Number of values a side from which `mann_whitney` can return less than `alpha`.

    >>> fewest_a_side(0.002)
    7

    Raises:
        ValueError: `alpha` is not positive, so no number is enough.
    """
    if not alpha > 0:
        raise ValueError(f"no number of samples reaches p < {alpha:g}")
    size = 1
    while smallest_p(size, size) >= alpha:
        size += 1
    return size


def mcnemar(only_one: int, only_other: int) -> float:
    """Two-sided exact p of McNemar's test (1947) on the discordant pairs; 1 without any.

    `only_one` counts pairs where just the first side was right, `only_other` the reverse.

    >>> round(mcnemar(3, 12), 6)
    0.035156

    Raises:
        ValueError: a count is negative.
    """
    if min(only_one, only_other) < 0:
        raise ValueError(f"{min(only_one, only_other)} pairs are no count")
    total = only_one + only_other
    tail = sum(math.comb(total, k) for k in range(min(only_one, only_other) + 1))
    # Both are whole numbers of any size; their quotient is rounded once.
    return min(1.0, float(2 * tail / 2**total))


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Share of successes with Wilson's score interval (1927): sensible near 0 and 1.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is no share")
    share, z = successes / trials, NormalDist().inv_cdf((1 + confidence) / 2)
    shrunk = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrunk
    reach = z / shrunk * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    # The ends are exact where nothing or everything succeeded; rounding would leave a remainder.
    low = 0.0 if successes == 0 else centre - reach
    high = 1.0 if successes == trials else centre + reach
    return Interval(share, low, high)
