"""Exact tests: how often chance alone would look like this.

scipy is imported when a test is asked for: it takes longer to import than a table takes to print.
"""

from __future__ import annotations

import functools
import math
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from compresskit.stats.resample import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ENUMERABLE = 20_000
"""Splits of the pooled values that are enumerated when ties forbid the closed form."""


def mann_whitney(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided exact p of the Mann-Whitney U test (Mann and Whitney 1947).

    Exact at any size: scipy's `auto` turns to a normal approximation above 8 values or with ties.
    With ties the splits of the pooled values are enumerated (up to 20 000 of them: 8 against 8 is
    12 870); beyond that the tie-corrected normal approximation is all there is.

    Raises:
        ValueError: a side is empty.
    """
    from scipy import stats

    a, b = list(one), list(other)
    if not a or not b:
        raise ValueError("the Mann-Whitney test needs values on both sides")
    pooled = a + b
    if len(set(pooled)) == len(pooled):
        return float(stats.mannwhitneyu(a, b, alternative="two-sided", method="exact").pvalue)
    if math.comb(len(pooled), len(a)) > _ENUMERABLE:
        return float(stats.mannwhitneyu(a, b, alternative="two-sided", method="asymptotic").pvalue)
    ranks = np.asarray(stats.rankdata(pooled))
    centre = len(a) * (len(pooled) + 1) / 2
    sums = np.abs(ranks[_splits(len(pooled), len(a))].sum(axis=1) - centre)
    # Half ranks are exact in binary; the first split is the one that was seen.
    return float((sums >= sums[0]).mean())


@functools.cache
def _splits(total: int, size: int) -> NDArray[np.intp]:
    """Every choice of `size` places out of `total`, one a row."""
    return np.asarray(list(combinations(range(total), size)))


def smallest_p(one: int, other: int) -> float:
    """Smallest p that `mann_whitney` can return for these numbers of values: 2 / C(m + n, m)."""
    return min(1.0, 2 / math.comb(one + other, one))


def mcnemar(only_one: int, only_other: int) -> float:
    """Two-sided exact p of McNemar's test (1947) on the discordant pairs; 1 without any.

    `only_one` counts pairs where just the first side was right, `only_other` the reverse.

    >>> round(mcnemar(3, 12), 6)
    0.035156
    """
    if only_one + only_other == 0:
        return 1.0
    from scipy import stats

    total = only_one + only_other
    return float(stats.binomtest(min(only_one, only_other), total, 0.5).pvalue)


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Share of successes with Wilson's score interval (1927): sensible near 0 and 1.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is no share")
    from scipy import stats

    found = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(found.low), float(found.high))
