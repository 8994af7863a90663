"""Point estimates and their spread.

Percentiles are numpy's linear ones (type 7), standard deviations have ddof 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def percentile(values: Sequence[float], q: float) -> float:
    """Linear percentile, q in percent.

    >>> [percentile(range(1, 11), q) for q in (50, 90, 95, 99)]
    [5.5, 9.1, 9.55, 9.91]
    """
    found = np.percentile(np.asarray(list(values), dtype=float), q)
    # Interpolation leaves noise in the last digit; 15 digits keep small numbers whole.
    return float(f"{found:.15g}")


def median(values: Sequence[float]) -> float:
    """Middle value; raises `ValueError` on nothing, as `percentile` does."""
    return percentile(values, 50)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return float(np.mean(np.asarray(list(values), dtype=float)))


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean (ddof 1), or None with fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(np.asarray(list(values), dtype=float), ddof=1) / math.sqrt(len(values)))


def coefficient_of_variation(values: Sequence[float]) -> float | None:
    """Standard deviation (ddof 1) over mean, or None with fewer than two values or a zero mean."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return (
        None
        if centre == 0
        else float(np.std(np.asarray(list(values), dtype=float), ddof=1) / abs(centre))
    )
