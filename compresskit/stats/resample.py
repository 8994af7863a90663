"""Bootstrap intervals: how much a number would differ had other repetitions been drawn.

All take a fixed seed, so that the same record always prints the same interval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class Interval(NamedTuple):
    """A point estimate with a confidence interval."""

    value: float
    low: float
    high: float


def ratio_of_medians(
    variant: Sequence[float],
    baseline: Sequence[float],
    *,
    paired: bool = False,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Ratio median(variant) / median(baseline) with a percentile-bootstrap interval.

    With `paired`, values of one index were taken side by side and are drawn together, so what the
    machine did to both cancels; otherwise the two sides are resampled apart.

    Raises:
        ValueError: a side is empty or holds a value that is not positive, or pairs do not match.
    """
    rng = np.random.default_rng(0)
    a, b = _positive(variant), _positive(baseline)
    if paired and a.size != b.size:
        raise ValueError("pairs need equally many values on both sides")
    first = rng.integers(a.size, size=(resamples, a.size))
    second = first if paired else rng.integers(b.size, size=(resamples, b.size))
    ratios = np.median(a[first], axis=1) / np.median(b[second], axis=1)
    low, high = _tails(ratios, confidence)
    return Interval(float(np.median(a) / np.median(b)), low, high)


def weighted_mean_difference(
    variant: Sequence[float],
    baseline: Sequence[float],
    weights: Sequence[float],
    *,
    resamples: int = 4000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of variant - baseline over paired windows, weighted, with a bootstrap over windows.

    Tokens of one window depend on each other, so whole windows are drawn (measured per window,
    never per token).

    Raises:
        ValueError: the three sequences differ in length, or are empty.
    """
    difference = np.asarray(list(variant), dtype=float) - np.asarray(list(baseline), dtype=float)
    weight = np.asarray(list(weights), dtype=float)
    if difference.size == 0 or difference.size != weight.size:
        raise ValueError("a paired difference needs as many weights as pairs, and at least one")
    rng = np.random.default_rng(0)
    drawn = rng.integers(difference.size, size=(resamples, difference.size))
    means = (difference[drawn] * weight[drawn]).sum(axis=1) / weight[drawn].sum(axis=1)
    low, high = _tails(means, confidence)
    return Interval(float((difference * weight).sum() / weight.sum()), low, high)


def _tails(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _positive(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(list(values), dtype=float)
    if array.size == 0 or not (array > 0).all():
        raise ValueError("a ratio needs positive values on both sides")
    return array
