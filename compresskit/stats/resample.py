"""Bootstrap intervals: how much a number would differ had other repetitions been drawn.

The draws are seeded by the number of values alone, so the same record always prints the same
interval, and swapping the two sides of a ratio gives exactly the inverse interval. They are made
once per number of values: a comparison of two suites asks for thousands of intervals.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Values = NDArray[np.float64]
    Places = NDArray[np.intp]


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
    machine did to both cancels; otherwise the two sides are resampled apart. One value a side
    gives an interval of width 0: judge it by the number of values, as `verdict.judge` does.

    Raises:
        ValueError: a side is empty or holds a value that is not positive, or pairs do not match.
    """
    a, b = _positive(variant), _positive(baseline)
    if paired and a.size != b.size:
        raise ValueError("pairs need equally many values on both sides")
    # Percentiles of the logarithm treat a ratio and its inverse alike.
    with np.errstate(all="raise"):
        try:
            logs = (_paired_logs if paired else _unpaired_logs)(a, b, resamples)
            low, high = np.exp(_tails(logs, confidence))
            return Interval(float(np.median(a) / np.median(b)), float(low), float(high))
        except FloatingPointError:
            raise ValueError("the two sides differ by more than a float can hold") from None


def median_ratio(
    variant: Sequence[float],
    baseline: Sequence[float],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Median of variant / baseline over rounds, with a bootstrap over rounds.

    Where the machine changes from round to round, a round's ratio is much steadier than either of
    its sides, and this interval narrower than that of the ratio of medians. The middle of two
    ratios is their geometric mean, so that swapping the sides inverts it.

    Raises:
        ValueError: a side is empty or holds a value that is not positive, or rounds do not match.
    """
    a, b = _positive(variant), _positive(baseline)
    if a.size != b.size:
        raise ValueError("pairs need equally many values on both sides")
    logs = np.log(a) - np.log(b)
    # Drawn by round, not by rank: the mirror image of the draws is then that of the sides.
    drawn = np.sort(logs[_draws(logs.size, resamples, 0)], axis=1)
    middles = (drawn[:, (logs.size - 1) // 2] + drawn[:, logs.size // 2]) / 2
    low, high = np.exp(_tails(middles, confidence))
    return Interval(float(np.exp(np.median(logs))), float(low), float(high))


def _paired_logs(a: Values, b: Values, resamples: int) -> Values:
    drawn = _draws(a.size, resamples, 0)
    lower, upper = (a.size - 1) // 2, a.size // 2
    x, y = np.sort(a[drawn], axis=1), np.sort(b[drawn], axis=1)
    return np.log(x[:, lower] + x[:, upper]) - np.log(y[:, lower] + y[:, upper])


def _unpaired_logs(a: Values, b: Values, resamples: int) -> Values:
    x, y = np.sort(a), np.sort(b)
    if a.size != b.size:
        return _log_medians(x, resamples, 0) - _log_medians(y, resamples, 0)
    # Of equal sizes each half of the draws is used both ways round, or swapping the sides would
    # give another interval.
    half = -(-resamples // 2)
    return np.concatenate(
        [
            _log_medians(x, half, 0) - _log_medians(y, half, 1),
            _log_medians(x, half, 1) - _log_medians(y, half, 0),
        ]
    )


def _log_medians(ordered: Values, resamples: int, stream: int) -> Values:
    """Logarithms of twice the medians of resampled values, given the values in order.

    The middle of a resample is where the middle of the sorted places is, and those are known
    before any value is.
    """
    lower, upper = _middles(ordered.size, resamples, stream)
    return np.log(ordered[lower] + ordered[upper])


@functools.lru_cache(maxsize=8)
def _draws(size: int, resamples: int, stream: int) -> Places:
    """Places drawn with replacement, one resample a row."""
    return np.random.default_rng([size, stream]).integers(size, size=(resamples, size))


@functools.lru_cache(maxsize=8)
def _counts(size: int, resamples: int, stream: int) -> Values:
    """How often each place was drawn, one resample a row: all that a sum needs to know."""
    drawn = _draws(size, resamples, stream)
    often = np.zeros((resamples, size))
    np.add.at(often, (np.arange(resamples)[:, None], drawn), 1)
    return often


@functools.lru_cache(maxsize=64)
def _middles(size: int, resamples: int, stream: int) -> tuple[Places, Places]:
    """The two middle places of each resample (the same one twice where `size` is odd)."""
    drawn = np.sort(_draws(size, resamples, stream), axis=1)
    return drawn[:, (size - 1) // 2].copy(), drawn[:, size // 2].copy()


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
        ValueError: the three sequences differ in length or are empty, a value is not finite, or a
            weight is not positive.
    """
    x, y, weight = (np.asarray(list(side), dtype=float) for side in (variant, baseline, weights))
    if x.size == 0 or not x.size == y.size == weight.size:
        raise ValueError("a paired difference needs as many weights as pairs, and at least one")
    if not (np.isfinite(x) & np.isfinite(y) & np.isfinite(weight) & (weight > 0)).all():
        raise ValueError("a paired difference needs finite values and positive weights")
    difference = x - y
    often = _counts(x.size, resamples, 0)
    means = (often @ (difference * weight)) / (often @ weight)
    low, high = _tails(means, confidence)
    return Interval(float((difference * weight).sum() / weight.sum()), float(low), float(high))


def _tails(values: Values, confidence: float) -> Values:
    """Linear percentiles at both ends: numpy's own take four times as long on so few values."""
    tail = (1 - confidence) / 2
    at = np.array([tail, 1 - tail]) * (values.size - 1)
    below = at.astype(int)
    above = np.minimum(below + 1, values.size - 1)
    ordered = np.partition(values, [*below, *above])
    return np.asarray(ordered[below] + (ordered[above] - ordered[below]) * (at - below))


def _positive(values: Sequence[float]) -> Values:
    array = np.asarray(list(values), dtype=float)
    if array.size == 0 or not ((array > 0) & np.isfinite(array)).all():
        raise ValueError("a ratio needs positive values on both sides")
    return array
