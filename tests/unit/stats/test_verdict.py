"""The verdict: each word, and samples at the edge of what can be judged."""

from __future__ import annotations

import math

import pytest

from compresskit.stats import judge

STEADY = [1.00, 1.01, 0.99, 1.02, 0.98, 1.005, 0.995, 1.015]


def scaled(factor: float, samples=STEADY) -> list[float]:
    return [factor * value for value in samples]


def word(base, new, *, lower_is_better=True, paired=True, **options) -> str:
    return judge(base, new, lower_is_better=lower_is_better, paired=paired, **options).word


def test_a_clear_slowdown_is_worse_for_times_and_better_for_rates():
    assert word(STEADY, scaled(1.3)) == "worse"
    assert word(STEADY, scaled(1 / 1.3)) == "better"
    assert word(STEADY, scaled(1.3), lower_is_better=False) == "better"
    assert word(STEADY, scaled(1 / 1.3), lower_is_better=False) == "worse"


def test_equal_sides_are_the_same():
    found = judge(STEADY, scaled(1.001), lower_is_better=True, paired=True)
    assert (found.word, found.reason, found.n_base, found.n_new) == ("same", "", 8, 8)


def test_a_significant_difference_that_nobody_cares_about_is_the_same():
    found = judge(STEADY, scaled(1.045), lower_is_better=True, paired=True, alpha=0.05)
    assert found.p < 0.05
    assert found.word == "same"


def test_a_big_difference_that_chance_explains_is_inconclusive():
    wild = [1.0, 1.4, 0.8, 1.3, 0.7, 1.2, 0.9, 1.5]
    found = judge(STEADY, wild, lower_is_better=True, paired=False)
    assert found.ratio.value > found.factor
    assert found.word == "inconclusive"
    assert "chance alone" in found.reason


def test_noise_within_the_factor_is_inconclusive():
    wild = [1.0, 1.4, 0.8, 1.3, 0.7, 0.99, 0.9, 1.01]
    found = judge(STEADY, wild, lower_is_better=True, paired=False)
    assert found.word == "inconclusive"
    assert "leaves the factor 1.05 open" in found.reason


@pytest.mark.parametrize("samples", range(1, 7))
def test_fewer_than_seven_samples_never_decide(samples):
    found = judge([1.0] * samples, [9.0] * samples, lower_is_better=True, paired=True)
    assert found.word == "inconclusive"
    assert "at least 7 a side" in found.reason


def test_seven_samples_decide():
    assert word([1.0] * 7, [9.0] * 7) == "worse"


def test_constant_samples_are_judged_by_their_values():
    assert word([1.0] * 8, [1.0] * 8) == "same"
    assert word([1.0] * 8, [1.2] * 8) == "worse"
    assert word([1.0] * 8, [1.2] * 4 + [1.0] * 4, paired=False) == "inconclusive"


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_is_no_time_is_refused(bad):
    with pytest.raises(ValueError, match="positive values"):
        judge(STEADY, [*STEADY[:-1], bad], lower_is_better=True, paired=True)


def test_nothing_cannot_be_judged():
    with pytest.raises(ValueError, match="positive values"):
        judge([], [1.0], lower_is_better=True, paired=False)


def test_pairs_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        judge(STEADY, STEADY[:-1], lower_is_better=True, paired=True)


@pytest.mark.parametrize("options", [{"factor": 0.9}, {"alpha": 0.0}, {"alpha": 1.5}])
def test_an_impossible_rule_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        judge(STEADY, STEADY, lower_is_better=True, paired=True, **options)
