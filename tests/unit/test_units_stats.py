"""Units and statistics: exact small cases, and laws that hold for all numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from compresskit.stats import (
    coefficient_of_variation,
    mean,
    median,
    percentile,
    ratio_of_medians,
    standard_error,
)
from compresskit.units import Unit, format_quantity, significant

numbers = st.floats(min_value=1e-6, max_value=1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (0.00123, "0.00123"),
        (99.96, "100"),
        (1000, "1000"),
        (-2.5, "-2.50"),
        (0.00001234, "1.23e-05"),
    ],
)
def test_three_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, Unit.SECOND, "12.3 ms"),
        (4.56e-6, Unit.SECOND, "4.56 µs"),
        (125.0, Unit.SECOND, "125 s"),
        (269_060_552, Unit.BYTE, "269 MB"),
        (999, Unit.BYTE, "999 B"),
        (24_576, Unit.BYTE_PER_TOKEN, "24.6 kB/token"),
        (0.312, Unit.JOULE_PER_TOKEN, "312 mJ/token"),
        (1.5, Unit.RATIO, "1.50"),
        (35.1, Unit.TOKEN_PER_SECOND, "35.1 token/s"),
        (0.0, Unit.SECOND, "0 s"),
    ],
)
def test_a_quantity_is_printed_with_a_readable_prefix(value, unit, text):
    assert format_quantity(value, unit) == text


@settings(deadline=None)
@given(st.floats(min_value=1e-4, max_value=1e9))
def test_printing_keeps_three_digits(value):
    assert float(significant(value)) == pytest.approx(value, rel=5.1e-3)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.floats(0, 100))
def test_percentile_is_numpys_linear_one(values, q):
    expected = np.percentile(np.array(values), q, method="linear")
    assert percentile(values, q) == pytest.approx(expected, abs=0, rel=1e-14)


def test_small_numbers_keep_their_digits():
    assert percentile([1.2345678901e-9, 1.2345678901e-9], 50) == 1.2345678901e-9


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30))
def test_median_and_mean_lie_between_the_extremes(values):
    slack = 1e-9 * max(values)
    for centre in (median(values), mean(values)):
        assert min(values) - slack <= centre <= max(values) + slack


def test_spread_needs_two_values():
    assert standard_error([1.0]) is None
    assert coefficient_of_variation([1.0]) is None
    assert coefficient_of_variation([0.0, 0.0]) is None


def test_standard_error_has_ddof_1():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


def test_the_interval_of_a_ratio_holds_the_ratio_and_is_repeatable():
    variant, baseline = [20.0, 21.0, 19.5, 20.5, 20.2], [10.0, 10.1, 9.9, 10.2, 10.0]
    found = ratio_of_medians(variant, baseline)
    assert found.value == pytest.approx(2.02)
    assert found.low <= found.value <= found.high
    assert found == ratio_of_medians(variant, baseline)


@settings(deadline=None)
@given(st.lists(numbers, min_size=3, max_size=8), st.floats(0.1, 10))
def test_a_ratio_scales_with_its_numerator(values, factor):
    one = ratio_of_medians(values, values, resamples=50)
    scaled = ratio_of_medians([factor * v for v in values], values, resamples=50)
    assert one.value == 1.0
    assert scaled.value == pytest.approx(factor)
    assert scaled.high == pytest.approx(factor * one.high)


@pytest.mark.parametrize("values", [[], [0.0, 1.0], [-1.0]])
def test_a_ratio_of_nothing_or_of_zero_is_refused(values):
    with pytest.raises(ValueError, match="positive values"):
        ratio_of_medians(values, [1.0])
    with pytest.raises(ValueError, match="positive values"):
        ratio_of_medians([1.0], values)


@pytest.mark.parametrize("summary", [median, mean, lambda values: percentile(values, 95)])
@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf, 1.0]])
def test_nothing_and_nan_have_no_summary(summary, values):
    with pytest.raises(ValueError, match=r"no values|not a finite number"):
        summary(values)


@pytest.mark.parametrize("spread", [standard_error, coefficient_of_variation])
def test_nan_has_no_spread(spread):
    with pytest.raises(ValueError, match="not a finite number"):
        spread([math.nan, 1.0])


def test_one_value_is_its_own_summary():
    assert (median([2.5]), mean([2.5]), percentile([2.5], 99)) == (2.5, 2.5, 2.5)
