"""Exact tests beside scipy's, which counts or enumerates in other ways, and published figures."""

from __future__ import annotations

import math
from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import stats as oracle

from compresskit.stats import fewest_a_side, mann_whitney, mcnemar, signed_rank, smallest_p, wilson
from compresskit.stats.exact import _COUNTABLE

ENUMERATE = oracle.PermutationMethod(n_resamples=np.inf)


def drawn(seed: int, m: int, n: int, *, step: float | None = None) -> tuple[list, list]:
    rng = np.random.default_rng(seed)
    one, other = rng.normal(0, 1, m), rng.normal(0.7, 1, n)
    if step:
        one, other = (np.round(side / step) * step for side in (one, other))
    return one.tolist(), other.tolist()


@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 7), (8, 8), (9, 9), (3, 17), (6, 7), (20, 25)])
@pytest.mark.parametrize("seed", range(3))
def test_without_ties_it_is_scipys_exact_test(m, n, seed):
    one, other = drawn(seed, m, n)
    expected = oracle.mannwhitneyu(one, other, method="exact").pvalue
    assert mann_whitney(one, other) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("m", "n"), [(3, 3), (4, 5), (5, 5), (3, 6), (6, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_with_ties_it_is_scipys_enumeration(m, n, seed):
    one, other = drawn(seed, m, n, step=1.0)
    assert len({*one, *other}) < m + n
    expected = oracle.mannwhitneyu(one, other, method=ENUMERATE).pvalue
    assert mann_whitney(one, other) == pytest.approx(expected, rel=1e-12)


def test_the_asymptotic_test_would_say_something_else():
    """What scipy's `auto` gives from nine values a side on; measured in the specification."""
    one, other = list(range(9)), list(range(9, 18))
    assert mann_whitney(one, other) == pytest.approx(0.000041, abs=5e-7)
    assert oracle.mannwhitneyu(one, other, method="asymptotic").pvalue == pytest.approx(
        0.000412, abs=5e-7
    )


def test_many_values_take_the_tie_corrected_approximation():
    one, other = drawn(0, 150, 140, step=0.1)
    assert _COUNTABLE < 290 * 140 * 140 * 145
    expected = oracle.mannwhitneyu(one, other, method="asymptotic").pvalue
    assert mann_whitney(one, other) == pytest.approx(expected, rel=1e-9)


def test_the_change_to_the_approximation_is_no_step():
    """Just above the limit the approximation stays close to the exact p, and above it."""
    one, other = drawn(4, 80, 80)
    other = [value - 0.3 for value in other]
    exact = oracle.mannwhitneyu(one, other, method="exact").pvalue
    assert 1e-4 < exact < 0.01
    assert exact < mann_whitney(one, other) <= 1.25 * exact


@pytest.mark.parametrize(("samples", "p"), [(5, 0.00794), (6, 0.00216), (7, 0.00058), (8, 0.00016)])
def test_the_smallest_p_of_small_samples(samples, p):
    """Figures of the specification, 2 / C(2n, n): six a side can never reach 0.002."""
    apart = list(range(samples)), list(range(samples, 2 * samples))
    assert smallest_p(samples, samples) == pytest.approx(p, abs=5e-6)
    assert mann_whitney(*apart) == pytest.approx(smallest_p(samples, samples))
    assert (p < 0.002) == (samples >= fewest_a_side(0.002))


def test_no_number_of_samples_reaches_certainty():
    with pytest.raises(ValueError, match="no number"):
        fewest_a_side(0.0)


@pytest.mark.parametrize(("m", "n"), [(3, 17), (4, 10), (5, 8), (6, 7)])
def test_unequal_sizes_that_can_fire(m, n):
    """Listed in the specification: C(m + n, m) must exceed 1000."""
    assert math.comb(m + n, m) > 1000
    assert smallest_p(m, n) < 0.002
    assert smallest_p(m, n - 1) >= 0.002


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_all_values_equal_is_no_evidence(value):
    assert mann_whitney([value] * 8, [value] * 8) == 1.0
    assert mann_whitney([value] * 200, [value] * 200) == 1.0


def test_one_value_a_side_is_no_evidence():
    assert mann_whitney([1.0], [2.0]) == 1.0


@pytest.mark.parametrize("bad", [[], [math.nan, 1.0], [math.inf, 1.0]])
def test_nothing_and_nan_are_refused(bad):
    for sides in ((bad, [1.0, 2.0]), ([1.0, 2.0], bad)):
        with pytest.raises(ValueError, match="Mann-Whitney"):
            mann_whitney(*sides)


@pytest.mark.parametrize(("b", "c"), [(3, 12), (12, 3), (0, 1), (5, 5), (0, 9), (400, 600)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(b, c):
    expected = oracle.binomtest(min(b, c), b + c, 0.5).pvalue
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_the_specification():
    assert mcnemar(3, 12) == pytest.approx(0.035156, abs=5e-7)
    assert mcnemar(0, 0) == 1.0
    with pytest.raises(ValueError, match="no count"):
        mcnemar(-1, 3)


def test_wilson_of_newcombe_1998():
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score, no continuity)."""
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611)}
    for (successes, trials), (low, high) in published.items():
        found = wilson(successes, trials)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
        assert found.value == successes / trials


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (3, 20), (999, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_wilson_is_scipys(successes, trials, confidence):
    expected = oracle.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    found = wilson(successes, trials, confidence=confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_shares_are_refused(successes, trials):
    with pytest.raises(ValueError, match="no share"):
        wilson(successes, trials)


@given(
    one=st.lists(st.sampled_from([1.0, 1.1, 1.3, 2.0, 2.5]), min_size=1, max_size=9),
    data=st.data(),
)
def test_signed_rank_counts_every_pattern_of_signs(one, data):
    """Oracle: all 2^n patterns, written out."""
    other = data.draw(
        st.lists(st.sampled_from([1.0, 1.2, 1.3, 2.0, 3.0]), min_size=len(one), max_size=len(one))
    )
    logs = np.array([x for x in np.log(one) - np.log(other) if x != 0])
    if not len(logs):
        assert signed_rank(one, other) == 1.0
        return
    ranks = oracle.rankdata(np.abs(logs))
    sums = np.array(
        [ranks[list(pattern)].sum() for pattern in product([False, True], repeat=len(logs))]
    )
    seen = ranks[logs > 0].sum()
    tail = min((sums <= seen + 1e-9).mean(), (sums >= seen - 1e-9).mean())
    assert signed_rank(one, other) == pytest.approx(min(1.0, 2 * tail))


def test_signed_rank_is_scipys_where_scipy_is_exact():
    rng = np.random.default_rng(3)
    for size in (5, 10, 20, 40):
        one, other = np.exp(rng.standard_normal((2, size)))
        found = oracle.wilcoxon(np.log(one) - np.log(other), method="exact").pvalue
        assert signed_rank(one, other) == pytest.approx(found)


def test_signed_rank_needs_ten_pairs_for_our_level():
    for size, fires in ((9, False), (10, True)):
        assert (signed_rank([1.0] * size, [1.0 + k for k in range(1, size + 1)]) < 0.002) is fires


@pytest.mark.parametrize(
    "pairs", [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [np.nan])]
)
def test_signed_rank_refuses_what_are_no_pairs(pairs):
    with pytest.raises(ValueError, match="signed-rank"):
        signed_rank(*pairs)
