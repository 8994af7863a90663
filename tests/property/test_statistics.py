"""Laws of the statistics: what must hold for all samples, not for chosen ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings, strategies as st

from compresskit.stats import FACTOR, judge, mann_whitney, mcnemar, ratio_of_medians, wilson
from compresskit.stats.calibration import residuals

times = st.floats(0.25, 4.0, allow_nan=False)
side = st.lists(times, min_size=1, max_size=12)
decisive = st.lists(times, min_size=7, max_size=10)
# Few distinct values: ties within and between the sides.
coarse = st.lists(st.sampled_from([1.0, 1.25, 1.5, 2.0]), min_size=7, max_size=10)
ORDER = {"better": 0, "same": 1, "inconclusive": 1, "worse": 2}
OPPOSITE = {"better": "worse", "worse": "better", "same": "same", "inconclusive": "inconclusive"}


def verdict(base, new, *, lower_is_better=True, paired=False):
    return judge(base, new, lower_is_better=lower_is_better, paired=paired)


@settings(deadline=None)
@given(side, side)
def test_p_is_a_probability_and_knows_no_sides(one, other):
    p = mann_whitney(one, other)
    assert 0 < p <= 1
    assert mann_whitney(other, one) == pytest.approx(p, rel=1e-12)


@settings(deadline=None)
@given(side, side)
def test_p_depends_on_the_order_of_the_values_alone(one, other):
    """Any increasing function keeps it: here one that is exact in binary."""
    assert mann_whitney([8 * v for v in one], [8 * v for v in other]) == mann_whitney(one, other)
    shuffled = list(reversed(one))
    assert mann_whitney(shuffled, other) == mann_whitney(one, other)


@settings(deadline=None)
@given(st.one_of(decisive, coarse), st.one_of(decisive, coarse), st.booleans())
def test_swapping_the_sides_swaps_better_and_worse(base, new, paired):
    assume(not paired or len(base) == len(new))
    there, back = verdict(base, new, paired=paired), verdict(new, base, paired=paired)
    # An interval that ends on the factor itself may fall on either side of it by rounding.
    ends = (there.ratio.value, there.ratio.low, there.ratio.high)
    assume(all(abs(abs(math.log(end)) - math.log(FACTOR)) > 1e-9 for end in ends))
    assert back.word == OPPOSITE[there.word]
    assert back.p == pytest.approx(there.p, rel=1e-12)
    assert back.ratio.value == pytest.approx(1 / there.ratio.value)


@settings(deadline=None)
@given(decisive, decisive)
def test_higher_is_better_swaps_the_words_too(base, new):
    times = verdict(base, new)
    rates = verdict(base, new, lower_is_better=False)
    assert rates.word == OPPOSITE[times.word]


@settings(deadline=None)
@given(st.one_of(decisive, coarse), st.one_of(decisive, coarse), st.integers(-40, 40))
def test_the_unit_does_not_matter(base, new, exponent):
    """Powers of two are exact in binary, so not even a rounding may change anything."""
    unit = 2.0**exponent
    scaled = verdict([unit * v for v in base], [unit * v for v in new])
    plain = verdict(base, new)
    assert (scaled.word, scaled.p, scaled.ratio.value) == (
        plain.word,
        plain.p,
        plain.ratio.value,
    )


@settings(deadline=None)
@given(decisive, decisive, st.floats(1.0, 3.0))
def test_slower_is_never_judged_better(base, new, slowdown):
    """Monotone: making the new side slower moves the word towards worse, never back."""
    assume(len({*base, *new, *(slowdown * v for v in new)}) >= len(base) + len(new))
    slower = [slowdown * v for v in new]
    assume(len({*base, *new}) == len({*base, *slower}) == len(base) + len(new))
    assert ORDER[verdict(base, slower).word] >= ORDER[verdict(base, new).word]


@settings(deadline=None)
@given(st.lists(times, min_size=1, max_size=6), side)
def test_too_few_samples_never_decide(base, new):
    assert verdict(base, new[:6]).word == "inconclusive"


@settings(deadline=None)
@given(st.one_of(decisive, coarse))
def test_nothing_differs_from_itself(samples):
    found = verdict(samples, samples, paired=True)
    assert found.word == "same"
    assert found.ratio == (1.0, 1.0, 1.0)


@settings(deadline=None)
@given(side, side, st.booleans())
def test_an_interval_is_in_order_and_within_the_extremes(variant, baseline, paired):
    assume(not paired or len(variant) == len(baseline))
    found = ratio_of_medians(variant, baseline, paired=paired, resamples=100)
    assert found.low <= found.high
    slack = 1 + 1e-12
    assert found.low * slack >= min(variant) / max(baseline)
    assert found.high <= slack * max(variant) / min(baseline)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_knows_no_sides_and_shrinks_with_the_imbalance(b, c):
    p = mcnemar(b, c)
    assert 0 < p <= 1
    assert mcnemar(c, b) == p
    assert mcnemar(min(b, c), max(b, c) + 1) <= p or b == c


@settings(deadline=None)
@given(st.integers(1, 2000), st.data())
def test_wilson_holds_the_share_and_stays_within_0_and_1(trials, data):
    successes = data.draw(st.integers(0, trials))
    found = wilson(successes, trials)
    assert 0 <= found.low <= found.value <= found.high <= 1
    mirrored = wilson(trials - successes, trials)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


@settings(deadline=None)
@given(st.lists(times, min_size=2, max_size=15), st.integers(-30, 30))
def test_residuals_have_no_unit_and_leave_the_sample_out(series, exponent):
    found = residuals(series)
    assert residuals([2.0**exponent * v for v in series]) == pytest.approx(found, rel=0)
    for index, value in enumerate(series):
        others = sorted(series[:index] + series[index + 1 :])
        middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
        assert found[index] == pytest.approx(value / middle)
