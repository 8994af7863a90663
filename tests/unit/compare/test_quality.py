"""Quality is judged by the bound of a paired interval."""

from __future__ import annotations

import pytest

from compresskit.units import Unit


@pytest.mark.parametrize(
    ("change", "metric"),
    [
        ({"nll": 0.02}, "nll_nats"),
        ({"kl": 0.002}, "kl_mean_nats"),
        ({"top1": -2}, "top1_agreement"),
    ],
)
def test_a_clear_loss_is_worse_and_its_reverse_better(bench, change, metric):
    base = bench.golden("int8")
    new = bench.windows(base, **change)
    outcomes = bench.judge(base, new)
    assert outcomes[metric].word == "worse"
    assert {m for m, outcome in outcomes.items() if outcome.failed} == {metric}
    assert bench.judge(new, base)[metric].word == "better"


def test_values_and_delta_are_weighted_means(bench):
    base = bench.golden("int8")
    outcome = bench.judge(base, bench.windows(base, nll=0.02))["nll_nats"]
    assert outcome.base == pytest.approx(3.0)
    assert outcome.delta.value == pytest.approx(0.02)
    assert outcome.delta.low == pytest.approx(0.02)
    assert outcome.unit is Unit.NAT


def test_a_loss_within_the_tolerance_is_the_same(bench):
    base = bench.golden("int8")
    assert bench.judge(base, bench.windows(base, nll=0.004))["nll_nats"].word == "same"


def test_the_tolerance_can_be_set(bench):
    base, new = bench.golden("int8"), bench.windows(bench.golden("int8"), nll=0.02)
    assert bench.judge(base, new, tolerances={"nll_nats": 0.05})["nll_nats"].word == "same"
    assert bench.judge(base, new, tolerances={"nll_nats": 0.0})["nll_nats"].word == "worse"


def test_a_point_estimate_beyond_the_tolerance_does_not_decide(bench):
    base = bench.golden("int8")
    likelihood = base.quality.likelihood
    # One window of eight lost much: the mean is beyond the tolerance, the interval reaches below.
    values = (likelihood.window_nll[0] + 0.2, *likelihood.window_nll[1:])
    quality = base.quality.model_copy(
        update={"likelihood": likelihood.model_copy(update={"window_nll": values})}
    )
    outcome = bench.judge(base, base.model_copy(update={"quality": quality}))["nll_nats"]
    assert outcome.delta.value > outcome.tolerance
    assert outcome.word == "inconclusive"


def test_a_loss_that_rounds_to_the_tolerance_is_not_rounded(bench):
    base = bench.golden("int8")
    assert bench.judge(base, bench.windows(base, nll=0.00500001))["nll_nats"].word == "worse"


def test_two_windows_are_too_few_for_a_verdict_unless_nothing_changed(bench):
    base = bench.golden("int8")

    def cut(record):
        likelihood = record.quality.likelihood
        update = {"window_nll": likelihood.window_nll[:2], "window_tokens": (64, 64)}
        quality = {"likelihood": likelihood.model_copy(update=update)}
        return record.model_copy(update={"quality": record.quality.model_copy(update=quality)})

    outcome = bench.judge(cut(base), cut(bench.windows(base, nll=0.1)))["nll_nats"]
    assert outcome.word == "inconclusive"
    assert "2 windows are too few" in outcome.reason
    assert bench.judge(cut(base), cut(base))["nll_nats"].word == "same"


def test_old_records_without_windows_are_not_compared(bench):
    old = bench.golden("int8", "v1")
    for metric in ("nll_nats", "kl_mean_nats", "top1_agreement"):
        outcome = bench.judge(old, old)[metric]
        assert outcome.word == "not compared"
        assert outcome.reason == "per-window values not stored"


def test_other_windows_are_not_compared(bench):
    base = bench.golden("int8")
    likelihood = base.quality.likelihood.model_copy(update={"window_tokens": (63,) + (64,) * 7})
    quality = base.quality.model_copy(update={"likelihood": likelihood})
    outcome = bench.judge(base, base.model_copy(update={"quality": quality}))["nll_nats"]
    assert outcome.word == "not compared"


def test_windows_without_tokens_are_not_compared(bench):
    base = bench.golden("int8")
    fidelity = base.quality.fidelity.model_copy(update={"window_tokens": (0,) * 8})
    record = base.model_copy(
        update={"quality": base.quality.model_copy(update={"fidelity": fidelity})}
    )
    for metric in ("kl_mean_nats", "top1_agreement"):
        assert bench.judge(record, record)[metric].word == "not compared"


def greedy(bench, **changes):
    base = bench.golden("int8")
    quality = base.quality.model_copy(
        update={"greedy": base.quality.greedy.model_copy(update=changes)}
    )
    return base.model_copy(update={"quality": quality})


def test_exact_matches_are_judged_by_mcnemar(bench):
    all_match = greedy(bench, first_divergence=(None,) * 8, prompts=8, exact_match=1.0)
    lost_six = greedy(bench, first_divergence=(3,) * 6 + (None,) * 2, prompts=8, exact_match=0.25)
    lost_five = greedy(bench, first_divergence=(3,) * 5 + (None,) * 3, prompts=8, exact_match=0.375)
    outcome = bench.judge(all_match, lost_six)["greedy_exact_match"]
    # McNemar's exact p of 6 against 0 is 2 / 2**6.
    assert (outcome.word, outcome.p) == ("worse", pytest.approx(2 / 64))
    assert bench.judge(lost_six, all_match)["greedy_exact_match"].word == "better"
    assert bench.judge(all_match, lost_five)["greedy_exact_match"].word == "inconclusive"


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (1.0, 1.0, "same"),
        (1.0, 0.91, "same"),
        (1.0, 0.89, "worse"),
        (1.0, 1.11, "worse"),
        (0.8, 1.0, "better"),
        (0.8, 0.8, "same"),
        (0.8, 0.7, "inconclusive"),
    ],
)
def test_answers_keep_their_length(bench, before, after, word):
    one, other = greedy(bench, length_ratio=before), greedy(bench, length_ratio=after)
    assert bench.judge(one, other)["length_ratio"].word == word


def test_a_dense_row_has_no_distance_to_compare(bench):
    dense = bench.golden("dense")
    assert "kl_mean_nats" not in bench.judge(dense, dense)
