"""Point estimates and their spread.

Percentiles are numpy's linear ones (type 7), standard deviations have ddof 1. Nothing here returns
NaN: a sample that holds one has no median, and that is a `ValueError`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def percentile(values: Sequence[float], q: float) -> float:
    """Linear percentile, q in percent.

    >>> [percentile(range(1, 11), q) for q in (50, 90, 95, 99)]
    [5.5, 9.1, 9.55, 9.91]

    Raises:
        ValueError: no values, or one that is not finite.
    """
    found = np.percentile(_finite(values), q)
    # Interpolation leaves noise in the last digit; 15 digits keep small numbers whole.
    return float(f"{found:.15g}")


def median(values: Sequence[float]) -> float:
    """Middle value; raises `ValueError` on nothing, as `percentile` does."""
    # numpy's percentile takes ten times as long for it, and tables take many medians.
    ordered = np.sort(_finite(values))
    lower, upper = ordered[(ordered.size - 1) // 2], ordered[ordered.size // 2]
    return float(f"{lower + (upper - lower) / 2:.15g}")


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; raises `ValueError` on nothing, as `percentile` does."""
    return float(np.mean(_finite(values)))


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean (ddof 1), or None with fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(_finite(values), ddof=1) / math.sqrt(len(values)))


def coefficient_of_variation(values: Sequence[float]) -> float | None:
    """Standard deviation (ddof 1) over mean, or None with fewer than two values or a zero mean."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return None if centre == 0 else float(np.std(_finite(values), ddof=1) / abs(centre))


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(list(values), dtype=float)
    if not array.size:
        raise ValueError("no values: there is nothing to summarise")
    if not np.isfinite(array).all():
        raise ValueError("a value is not a finite number")
    return array
