"""Bootstrap intervals: coverage by simulation, what pairing buys, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compresskit.stats import median_ratio, ratio_of_medians, weighted_mean_difference


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials, truth = 400, 1.1
    hits = 0
    for _ in range(trials):
        base, new = np.exp(rng.normal(0, 0.03, (2, 8)))
        found = ratio_of_medians(truth * new, base)
        hits += found.low <= truth <= found.high
    # 95 % nominal; three binomial standard errors are 3.3 percentage points.
    assert 0.917 <= hits / trials <= 0.99


def test_an_interval_that_is_too_confident_would_be_seen():
    """Negative control: a nominal 50 % interval misses far more often."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        base, new = np.exp(rng.normal(0, 0.03, (2, 8)))
        found = ratio_of_medians(new, base, confidence=0.5)
        hits += found.low <= 1.0 <= found.high
    assert hits / 200 < 0.8


def test_pairs_cancel_what_the_machine_did_to_both():
    """Under a common drift the paired interval is narrower, and still covers."""
    rng = np.random.default_rng(0)
    narrower, covered, trials = 0, 0, 100
    for _ in range(trials):
        drift = np.exp(np.cumsum(rng.normal(0, 0.05, 12)))
        base, new = np.exp(rng.normal(0, 0.01, (2, 12))) * drift
        paired, apart = (ratio_of_medians(new, base, paired=p) for p in (True, False))
        narrower += paired.high - paired.low < apart.high - apart.low
        covered += paired.low <= 1.0 <= paired.high
    assert narrower == trials
    assert covered >= 0.9 * trials


def test_pairs_buy_nothing_where_nothing_is_shared():
    """Negative control: with independent sides both intervals are about as wide."""
    rng = np.random.default_rng(0)
    widths = np.array(
        [
            [
                (i := ratio_of_medians(*sides, paired=paired)).high - i.low
                for paired in (True, False)
            ]
            for sides in np.exp(rng.normal(0, 0.03, (100, 2, 12)))
        ]
    )
    paired, apart = widths.mean(axis=0)
    assert paired == pytest.approx(apart, rel=0.15)


def test_ratios_of_rounds_are_steadier_than_their_sides():
    """Load that comes and goes: the median of the rounds' ratios still knows 2 % from nothing."""
    rng = np.random.default_rng(0)
    widths, covered = [], 0
    for _ in range(100):
        load = np.exp(rng.normal(0, 0.25, 12))
        base, new = np.exp(rng.normal(0, 0.01, (2, 12))) * load
        rounds, sides = median_ratio(1.02 * new, base), ratio_of_medians(new, base, paired=True)
        covered += rounds.low <= 1.02 <= rounds.high
        widths.append((rounds.high - rounds.low) / (sides.high - sides.low))
    assert np.median(widths) < 0.7
    assert covered >= 90


def test_the_median_of_ratios_by_hand():
    found = median_ratio([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert found == pytest.approx((3.0, 2.0, 4.0))
    assert median_ratio([1.0, 4.0], [1.0, 1.0]).value == pytest.approx(2.0)
    back = median_ratio([1.0] * 3, [2.0, 3.0, 4.0])
    assert (1 / back.value, 1 / back.high, 1 / back.low) == pytest.approx(found)
    with pytest.raises(ValueError, match="equally many"):
        median_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("paired", [True, False])
def test_constant_samples_have_an_interval_without_width(paired):
    assert ratio_of_medians([2.0] * 8, [1.0] * 8, paired=paired) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize("sizes", [(8, 8), (7, 10), (1, 1)])
def test_swapping_the_sides_inverts_the_interval(sizes):
    rng = np.random.default_rng(3)
    one, other = (np.exp(rng.normal(0, 0.1, size)) for size in sizes)
    for paired in {sizes[0] == sizes[1], False}:
        there = ratio_of_medians(one, other, paired=paired)
        back = ratio_of_medians(other, one, paired=paired)
        assert (1 / back.value, 1 / back.high, 1 / back.low) == pytest.approx(there, rel=1e-12)


@pytest.mark.parametrize("bad", [[0.0, 1.0], [-1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_what_no_clock_gives_is_refused(bad):
    with pytest.raises(ValueError, match="positive values"):
        ratio_of_medians(bad, [1.0, 1.0], paired=True)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="equally many"):
        ratio_of_medians([1.0, 2.0], [1.0], paired=True)


def test_numbers_beyond_floats_are_refused():
    with pytest.raises(ValueError, match="more than a float"):
        ratio_of_medians([1e300] * 3, [1e-300] * 3)


def test_windows_are_weighted_by_their_tokens():
    found = weighted_mean_difference([2.0, 1.0], [1.0, 1.0], [30, 10])
    assert found.value == pytest.approx(0.75)
    assert (found.low, found.high) == pytest.approx((0.0, 1.0))


def test_pairing_shrinks_a_quality_difference_to_its_noise():
    """Windows differ far more from each other than the artefact from its baseline."""
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 0.5, 16)
    found = weighted_mean_difference(base + 0.01 + rng.normal(0, 0.002, 16), base, [64] * 16)
    assert 0.008 < found.low < 0.01 < found.high < 0.012


@pytest.mark.parametrize(
    ("variant", "baseline", "weights"),
    [
        ([], [], []),
        ([1.0], [1.0, 2.0], [1, 1]),
        ([1.0], [1.0], [1, 1]),
        ([math.nan], [1.0], [1]),
        ([1.0], [1.0], [0]),
    ],
)
def test_a_difference_without_sound_pairs_is_refused(variant, baseline, weights):
    with pytest.raises(ValueError, match="paired difference"):
        weighted_mean_difference(variant, baseline, weights)


def test_swapping_the_sides_inverts_the_interval_of_rounds_exactly():
    one, other = [1.0] * 9, [1.0] * 7 + [2.0] * 2
    there, back = median_ratio(other, one), median_ratio(one, other)
    assert there.low == pytest.approx(1 / back.high, rel=1e-12)
    assert there.high == pytest.approx(1 / back.low, rel=1e-12)
