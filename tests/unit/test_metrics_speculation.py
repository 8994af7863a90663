"""Acceptance by hand-made steps: vLLM's definitions, three rates by place, time and prediction."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit import store
from compresskit.metrics import METRICS, Timed
from compresskit.metrics.acceptance import Acceptance, Step, acceptance, verifications
from compresskit.metrics.speculation import lossless
from compresskit.metrics.speedup import costs_of, passes_of
from compresskit.record import Arrival, Measured, Sample, StepCosts, Unavailable
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v2"


def steps(*pairs: tuple[int, int], most: int = 3) -> Acceptance:
    return Acceptance(tuple(Step(*pair) for pair in pairs), most)


def sample(*rows: list[tuple[int, int]], seconds: float = 1.0, **more) -> Sample:
    """A repetition whose chunks come a second apart; `rows` hold (drafted, accepted) by chunk."""
    longest = max(rows, key=len)
    totals = [1 + accepted for _, accepted in longest]
    return Sample(
        arrivals=tuple(Arrival(seconds * (n + 1), count) for n, count in enumerate(totals)),
        forwards=len(longest),
        drafted=sum(d for row in rows for d, _ in row),
        accepted=sum(a for row in rows for _, a in row),
        per_step_drafted=tuple(tuple(d for d, _ in row) for row in rows),
        per_step_accepted=tuple(tuple(a for _, a in row) for row in rows),
        **more,
    )


def with_samples(*samples: Sample, costs: StepCosts | None = None, draft: int = 4, batch: int = 1):
    """The synthetic n-gram record with other repetitions."""
    record = store.load(GOLDEN / "synthetic-ngram.json")
    block = record.blocks[0]
    probe = block.passes.latency.model_copy(update={"samples": samples, "batch": batch})
    passes = block.passes.model_copy(update={"latency": probe})
    stack = [{"name": "speculative/ngram", "params": {"draft": draft}}]
    return record.model_copy(
        update={
            "blocks": (block.model_copy(update={"passes": passes}),),
            "setup": record.setup.model_copy(update={"step_costs": costs}),
            "spec": record.spec.replace(stack=stack),
        }
    )


def value(name: str, record) -> float:
    reading = METRICS[name].value(record)
    assert not isinstance(reading, Unavailable), reading.reason
    return reading.value


# vLLM's definitions


def test_the_histogram_of_43_steps():
    found = steps(*[(3, 0)] * 39, (3, 1), *[(3, 3)] * 3)
    assert found.histogram() == [39, 1, 0, 3]
    assert (len(found.steps), found.drafted, found.accepted) == (43, 129, 10)
    assert found.mean_length() == pytest.approx(1.2325581395348837, rel=1e-15)
    assert found.rate() == pytest.approx(0.07751937984496124, rel=1e-15)
    assert found.per_position() == [4, 3, 3]


def test_two_steps_of_which_one_failed():
    found = steps((3, 2), (3, 0))
    assert found.mean_length() == 2.0
    assert found.rate() == pytest.approx(1 / 3)
    assert found.histogram() == [1, 0, 1, 0]


def test_what_was_not_sent_to_the_model_was_not_drafted():
    """Three drafted, one of them invalid before the pass: a step of two."""
    found = steps((2, 1))
    assert (found.mean_length(), found.rate(), found.drafted) == (2.0, 0.5, 2)


def test_the_three_rates_differ_where_drafts_differ_in_length():
    record = sample([(0, 0), (2, 2), (1, 0), (0, 0)])
    found = acceptance([Timed(record, 1, 8)], most=2)
    assert len(found.steps) == 2
    assert found.offered() == [0.5, 1.0]
    assert found.unconditional() == [0.5, 0.5]
    assert found.conditional() == [0.5, 1.0]
    # A draft that failed early says nothing of its later tokens: only the conditional rate knows.
    early = steps((3, 0), (3, 3), most=3)
    assert early.offered() == [0.5, 0.5, 0.5]
    assert early.conditional() == [0.5, 1.0, 1.0]


def test_a_place_that_no_draft_reached_has_no_rate():
    found = steps((2, 0), (2, 0), most=3)
    assert found.conditional() == [0.0, None, None]
    assert found.offered() == [0.0, 0.0, None]


@pytest.mark.parametrize(
    ("rates", "published"),
    [
        ((0.7296, 0.5208, 0.3545), 2.6049),
        ((0.6541, 0.3993, 0.2020), 2.2554),
        ((0.7165, 0.5120, 0.3337), 2.5622),
        ((0.29, 0.062, 0.0115), 1.3635),
    ],
)
def test_the_unconditional_rates_and_one_add_up_to_the_mean_length(rates, published):
    """Rates published for three models and a small one, as ten thousand steps that have them."""
    total = 10_000
    reached = [round(rate * total) for rate in rates]
    exactly = [total - reached[0], reached[0] - reached[1], reached[1] - reached[2], reached[2]]
    found = steps(*(pair for n, count in enumerate(exactly) for pair in [(3, n)] * count))
    assert found.unconditional() == pytest.approx(list(rates))
    assert 1 + sum(found.unconditional()) == pytest.approx(found.mean_length())
    assert found.mean_length() == pytest.approx(published, abs=1e-9)


def test_the_prefill_is_no_verification_unless_it_verified_something():
    plain = verifications(Timed(sample([(0, 0), (2, 1)]), 1, 8))
    assert plain == [(Step(2, 1),)]
    drafted_at_once = verifications(Timed(sample([(2, 1), (2, 1)]), 1, 8))
    assert len(drafted_at_once) == 2


def test_rows_of_a_batch_are_steps_of_their_own_while_they_last():
    one = Timed(sample([(0, 0), (2, 2), (2, 0)], [(0, 0), (1, 0)]), 2, 8)
    assert verifications(one) == [(Step(2, 2), Step(1, 0)), (Step(2, 0),)]
    assert acceptance([one]).drafted == 5


# As metrics


def test_counts_are_told_apart():
    record = with_samples(sample([(0, 0), (2, 2), (0, 0), (2, 1)]), sample([(0, 0), (4, 0)]))
    assert value("num_spec_steps", record) == 3
    assert value("num_verify_forwards", record) == 4
    assert value("num_draft_tokens", record) == 8
    assert value("num_accepted_draft_tokens", record) == 3
    assert value("mean_acceptance_length", record) == 2.0
    assert value("draft_acceptance_rate", record) == 3 / 8
    assert value("conditional_acceptance_at_1", record) == pytest.approx(2 / 3)
    assert value("unconditional_acceptance_at_2", record) == pytest.approx(1 / 3)
    assert value("offered_acceptance_at_3", record) == 0
    assert METRICS["num_spec_steps"].samples(record) == [2, 1]


def test_records_from_before_the_steps_were_kept_say_so():
    record = store.load(GOLDEN / "synthetic-ngram.json")
    for name in ("num_spec_steps", "mean_acceptance_length", "draft_s", "speedup_predicted"):
        assert "single steps" in METRICS[name].value(record).reason
    assert value("draft_acceptance_rate", record) == pytest.approx(0.5)


def test_plain_decoding_drafts_nothing():
    record = store.load(GOLDEN / "synthetic-dense.json")
    for name in ("num_draft_tokens", "mean_acceptance_length", "speedup_predicted", "host_s"):
        assert METRICS[name].value(record).reason == "nothing was drafted"


PARTS = {"judge": (9.0, 0.1, 0.1), "draft": (0.1, 0.3), "verify": (0.5, 0.6)}
"""Of two steps of a second each; judging the prefill is none of theirs."""


def test_a_step_is_drafting_verifying_and_the_host():
    record = with_samples(sample([(0, 0), (2, 2), (2, 0)], parts=PARTS))
    assert value("draft_s", record) == pytest.approx(0.2)
    assert value("verify_s", record) == pytest.approx(0.55)
    assert value("judge_s", record) == pytest.approx(0.1)
    assert value("host_s", record) == pytest.approx(0.25)
    assert value("step_s", record) == pytest.approx(1.0)
    shares = [value(f"{part}_share", record) for part in ("draft", "verify", "host")]
    assert sum(shares) == pytest.approx(1)


def test_a_loop_that_tells_no_parts_has_none():
    record = with_samples(sample([(0, 0), (2, 2)]))
    assert "parts" in METRICS["verify_s"].value(record).reason
    assert METRICS["verify_s"].samples(record) == []


PROBE = StepCosts(
    batch=1,
    tokens_in_cache=32,
    widths=(1, 2, 3),
    seconds=((0.5, 0.5, 2.5), (0.6, 0.6, 0.6), (0.55, 0.55, 0.55)),
    waited=((0.0, 0.0, 2.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
)


def test_the_probe_gives_medians_net_of_waiting():
    step, passes = passes_of(PROBE)
    assert step == 0.5
    assert passes == ((1, 1.0), (2, pytest.approx(1.2)), (3, pytest.approx(1.1)))
    # Negative control: one sample in which somebody else had the CPU would move a mean of them.
    raw = PROBE.model_copy(
        update={"seconds": ((0.5, 2.5, 2.5), *PROBE.seconds[1:]), "waited": None}
    )
    assert passes_of(raw)[0] == 2.5


def test_the_prediction_is_the_sum_over_the_steps_taken():
    taken = sample([(0, 0), (2, 2), (2, 0)], parts=PARTS)
    record = with_samples(taken, costs=PROBE, draft=2)
    # α is .5 and 1; c = .4 s / 4 tokens, h = .25 s, v(3) = 1.1, all over a pass of .5 s.
    c, h, v = 0.1 / 0.5, 0.25 / 0.5, 1.1
    expected = (1 + 0.5 + 0.5) / (2 * c + v + h)
    assert value("speedup_predicted", record) == pytest.approx(expected)
    assert value("tpot_predicted_s", record) == pytest.approx(0.5 / expected)
    assert value("draft_cost", record) == pytest.approx(c)
    assert value("host_cost", record) == pytest.approx(h)
    assert value("verify_cost", record) == pytest.approx(v)
    # S(0) = 1 / 1.5, S(1) = 1.5 / 1.9, S(2) = 2 / 2
    assert value("best_draft_length", record) == 2
    assert METRICS["speedup_predicted"].value(record).kind == "estimated"


def test_steps_without_a_draft_are_in_the_prediction():
    parts = {"judge": (0.0, 0.0, 0.0), "draft": (0.0, 0.0), "verify": (0.5, 0.5)}
    record = with_samples(sample([(0, 0), (2, 2), (0, 0)], parts=parts), costs=PROBE, draft=2)
    h = 0.5 / 0.5
    assert value("speedup_predicted", record) == pytest.approx((3 + 1) / (1.1 + h + 1 + h))


def test_without_a_probe_there_is_no_prediction():
    record = with_samples(sample([(0, 0), (2, 2), (2, 0)], parts=PARTS))
    assert "not measured" in METRICS["speedup_predicted"].value(record).reason
    assert METRICS["best_draft_length"].samples(record) == []


def test_the_trial_tells_what_drafting_costs_before_anything_is_measured():
    trial = sample([(0, 0), (2, 2), (2, 0)], parts=PARTS)
    costs = costs_of(PROBE.model_copy(update={"trial": trial}))
    assert costs.draft == pytest.approx(0.2)
    assert costs.host == pytest.approx(0.5)
    idle = sample([(0, 0), (0, 0), (0, 0)], parts=PARTS)
    unknown = costs_of(PROBE.model_copy(update={"trial": idle}))
    # Nothing was drafted: looking in vain is the host's time.
    assert unknown.draft == 0
    assert unknown.host == pytest.approx((0.25 + 0.2) / 0.5)


def test_energy_per_accepted_token_is_that_of_all_over_their_share():
    record = with_samples(sample([(0, 0), (2, 2), (2, 0)]))
    assert METRICS["j_per_accepted_token"].value(record).reason
    dense = store.load(GOLDEN / "synthetic-dense.json")
    energy = dense.blocks[0].passes.energy
    block = record.blocks[0]
    passes = block.passes.model_copy(update={"energy": energy})
    metered = record.model_copy(update={"blocks": (block.model_copy(update={"passes": passes}),)})
    each = METRICS["j_per_output_token"].value(dense)
    assert isinstance(each, Measured)
    # Five tokens were delivered, two of them accepted drafts.
    found = METRICS["j_per_accepted_token"].value(metered)
    assert (found.value, found.unit) == (pytest.approx(each.value * 5 / 2), Unit.JOULE_PER_TOKEN)


@pytest.mark.parametrize(
    ("params", "temperature", "word"),
    [({}, 0.0, "exact"), ({}, 1.0, "distribution"), ({"accept": "typical"}, 0.0, "none")],
)
def test_what_the_rule_of_acceptance_promises(params, temperature, word):
    record = with_samples(sample([(0, 0), (2, 2)]))
    spec = record.spec.replace(
        stack=[{"name": "speculative/ngram", "params": params}],
        sampling={"temperature": temperature},
    )
    assert lossless(record.model_copy(update={"spec": spec}))[0] == word


@pytest.mark.parametrize(("cached", "told"), [(16, True), (64, True), (15, False), (100, False)])
def test_passes_on_another_length_say_nothing_about_these_prompts(cached, told):
    probe = PROBE.model_copy(update={"tokens_in_cache": cached})
    record = with_samples(sample([(0, 0), (2, 2), (2, 0)], parts=PARTS), costs=probe, draft=2)
    found = METRICS["speedup_predicted"].value(record)
    assert (found.kind == "estimated") == told
    if not told:
        assert f"timed on {cached} tokens, the prompts have 32" in found.reason
