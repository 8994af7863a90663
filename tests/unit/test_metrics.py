"""Metrics: laws over arrival times, and a reason wherever there is no number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from compresskit import store
from compresskit.metrics import IS_BASELINE, METRICS, Timed, decode_at
from compresskit.metrics.core import combine
from compresskit.metrics.formulae import decode_s, e2e_s, gaps_s, step_s, tpot_s, ttft_s
from compresskit.record import (
    Arrival,
    EnergyWindow,
    Estimated,
    Measured,
    Phase,
    Record,
    Sample,
    Unavailable,
)
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"
JOULES = Measured(value=30.0, unit=Unit.JOULE, source="counter")


def golden(name: str) -> Record:
    return store.load(GOLDEN / f"synthetic-{name}.json")


def reading(metric: str, record: Record):
    return METRICS[metric].value(record)


def with_passes(record: Record, **passes) -> Record:
    block = record.blocks[0]
    changed = block.passes.model_copy(update=passes)
    return record.model_copy(update={"blocks": (block.model_copy(update={"passes": changed}),)})


@st.composite
def repetitions(draw) -> Timed:
    gaps = draw(st.lists(st.floats(1e-4, 10), min_size=2, max_size=40))
    tokens = draw(st.lists(st.integers(1, 8), min_size=len(gaps), max_size=len(gaps)))
    now, arrivals = 0.0, []
    for gap, count in zip(gaps, tokens, strict=True):
        now += gap
        arrivals.append(Arrival(now, count))
    sample = Sample(arrivals=tuple(arrivals), forwards=len(arrivals))
    return Timed(sample, draw(st.integers(1, 8)), draw(st.integers(1, 500)))


@settings(deadline=None)
@given(repetitions())
def test_the_first_token_and_the_gaps_make_up_the_whole(one):
    assert ttft_s(one) + sum(gaps_s(one)) == pytest.approx(e2e_s(one))
    assert ttft_s(one) + decode_s(one) == pytest.approx(e2e_s(one))
    assert len(gaps_s(one)) == one.chunks - 1


@settings(deadline=None)
@given(repetitions())
def test_time_per_token_is_step_time_over_tokens_per_step(one):
    per_step = (one.tokens - 1) / (one.chunks - 1)
    assert tpot_s(one) == pytest.approx(step_s(one) / per_step)


@settings(deadline=None)
@given(repetitions(), st.floats(0.1, 10))
def test_a_slower_clock_scales_every_time(one, factor):
    slow = tuple(Arrival(a.seconds * factor, a.tokens) for a in one.sample.arrivals)
    slower = one._replace(sample=one.sample.model_copy(update={"arrivals": slow}))
    for formula in (ttft_s, e2e_s, decode_s, tpot_s, step_s):
        assert formula(slower) == pytest.approx(factor * formula(one))


@settings(deadline=None)
@given(repetitions(), st.floats(0, 10))
def test_waiting_longer_for_the_first_token_changes_no_decode_time(one, wait):
    late = tuple(Arrival(a.seconds + wait, a.tokens) for a in one.sample.arrivals)
    delayed = one._replace(sample=one.sample.model_copy(update={"arrivals": late}))
    assert tpot_s(delayed) == pytest.approx(tpot_s(one), abs=1e-9)
    assert gaps_s(delayed) == pytest.approx(gaps_s(one), abs=1e-9)


@pytest.mark.parametrize("arrivals", [(), ((0.1, 1),)])
def test_one_token_has_no_time_per_token(arrivals):
    sample = Sample(arrivals=tuple(Arrival(*a) for a in arrivals), forwards=1)
    one = Timed(sample, 1, 8)
    assert decode_s(one) is None
    assert tpot_s(one) is None
    assert step_s(one) is None
    assert gaps_s(one) == []


def test_a_clock_that_stands_still_gives_no_infinite_rate():
    one = Timed(Sample(arrivals=(Arrival(0.1, 1), Arrival(0.1, 4)), forwards=2), 1, 8)
    assert tpot_s(one) is None


def test_every_metric_is_described_and_versioned():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert re.match(r"[a-z0-9_]+/\d+: .+\.$", metric.definition), name
        assert isinstance(metric.unit, Unit)
    formulae = [metric.definition.partition(":")[0] for metric in METRICS.values()]
    assert len(set(formulae)) == len(formulae)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_a_value_is_a_number_or_a_reason(path):
    record = store.load(path)
    for metric in METRICS.values():
        found = metric.value(record)
        if isinstance(found, Unavailable):
            assert found.reason
            assert metric.samples(record) == []
        else:
            assert found.unit in (metric.unit, Unit.JOULE_PER_TOKEN)
            assert metric.samples(record)


@pytest.mark.parametrize("name", ["skipped", "failed"])
def test_a_run_that_did_not_end_says_so_in_every_metric(name):
    record = golden(name)
    for metric in METRICS.values():
        assert metric.value(record).reason.startswith(f"{name}: ")


def test_speculation_is_counted_per_delivered_token():
    record = golden("ngram")
    # 15 tokens in 5 steps of 4 drafted tokens, 10 of them accepted; one prefill.
    assert reading("tokens_per_step", record).value == pytest.approx(3.0)
    assert reading("draft_acceptance_rate", record).value == pytest.approx(0.5)
    # Which steps drafted anything is not in a record of that age.
    assert "single steps" in reading("mean_acceptance_length", record).reason
    assert reading("forwards_per_token", record).value == pytest.approx(6 / 16)


def test_a_dense_run_accepts_nothing_because_it_drafts_nothing():
    record = golden("dense")
    assert reading("tokens_per_step", record).value == pytest.approx(1.0)
    assert isinstance(reading("draft_acceptance_rate", record), Unavailable)
    assert isinstance(reading("mean_acceptance_length", record), Unavailable)
    assert reading("forwards_per_token", record).value == pytest.approx(1.0)


def test_weights_are_summed_over_classes_and_divided_by_the_parameters_before():
    record = golden("int8")
    assert reading("weights_bytes", record).value == 112_000_000
    assert reading("effective_bits_per_parameter", record).value == pytest.approx(8.96)


def test_cache_bytes_are_per_row_and_token():
    memory = golden("dense").blocks[0].passes.memory
    record = with_passes(
        golden("dense"), memory=memory.model_copy(update={"batch": 2, "tokens_in_cache": 47})
    )
    held = sum(memory.cache_bytes.values())
    assert reading("kv_bytes_per_token", record).value == pytest.approx(held / 94)


def test_the_peak_leaves_loading_and_compressing_out():
    assert reading("peak_bytes", golden("int8")).value == pytest.approx(1.5 * 112_000_000)


def test_a_peak_with_an_unknown_window_is_unknown():
    memory = golden("dense").blocks[0].passes.memory
    unknown = Phase(peaks={"rss": Unavailable(reason="no high-water mark")})
    phases = {**memory.phases, "decode": unknown}
    record = with_passes(golden("dense"), memory=memory.model_copy(update={"phases": phases}))
    assert reading("peak_bytes", record) == Unavailable(reason="no high-water mark")


def test_the_throughput_pass_is_preferred_and_never_silently_replaced():
    record = golden("dense")
    assert reading("decode_tokens_per_s", record).value == pytest.approx(20 / 0.95)
    without = with_passes(record, throughput=())
    assert isinstance(reading("decode_tokens_per_s", without), Unavailable)


def test_a_batch_size_that_was_not_run_says_why():
    assert decode_at(4).value(golden("dense")).value == pytest.approx(50.0)
    assert "one sequence at a time" in decode_at(4).value(golden("ngram")).reason


def with_energy(*readings, tokens: int | None = 10) -> Record:
    """The synthetic dense record with one block per reading."""
    record = golden("dense")
    block = record.blocks[0]
    blocks = []
    for one in readings:
        window = EnergyWindow(reading=one, tokens=tokens)
        energy = block.passes.energy.model_copy(
            update={"generate": (window,), "prefill": (window,)}
        )
        passes = block.passes.model_copy(update={"energy": energy})
        blocks.append(block.model_copy(update={"passes": passes}))
    return record.model_copy(update={"blocks": tuple(blocks)})


def test_energy_is_joules_over_delivered_tokens_of_all_blocks():
    found = reading("j_per_output_token", with_energy(JOULES, JOULES))
    assert isinstance(found, Measured)
    assert found.value == pytest.approx(3.0)
    assert found.unit is Unit.JOULE_PER_TOKEN


def test_an_estimate_stays_an_estimate():
    estimate = Estimated(value=30.0, unit=Unit.JOULE, model="TDP")
    found = reading("j_per_output_token", with_energy(estimate))
    assert isinstance(found, Estimated)
    assert found.model == "TDP"


def test_measured_and_estimated_energy_are_never_added():
    estimate = Estimated(value=30.0, unit=Unit.JOULE, model="TDP")
    assert isinstance(reading("j_per_output_token", with_energy(JOULES, estimate)), Unavailable)


def test_zero_joules_are_no_measurement():
    still = Measured(value=0.0, unit=Unit.JOULE, source="counter")
    assert "did not tick" in reading("j_per_output_token", with_energy(still)).reason


def test_energy_without_a_count_of_tokens_has_no_denominator():
    found = reading("j_per_output_token", with_energy(JOULES, tokens=None))
    assert "no tokens" in found.reason


def test_combining_nothing_gives_the_reason_that_was_handed_in():
    absent = Unavailable(reason="nothing here")
    assert combine([], max, unit=Unit.BYTE, absent=absent) is absent


def test_quality_carries_its_standard_error():
    metric = METRICS["delta_nll_nats"]
    assert metric.value(golden("int8")).value == pytest.approx(0.002)
    assert metric.stderr(golden("int8")) == 0.001
    assert METRICS["nll_nats"].stderr(golden("int8")) == 0.02


def test_the_dense_run_has_no_distance_from_itself():
    assert reading("kl_mean_nats", golden("dense")).reason == IS_BASELINE


def test_first_divergence_counts_identical_continuations_to_their_end():
    # Indices 12, none, 30, none with a budget of 48: median of 12, 30, 48, 48.
    assert reading("first_divergence_tokens", golden("int8")).value == pytest.approx(39.0)


def test_a_pass_that_was_not_asked_for_says_so():
    record = golden("dense")
    protocol = {**record.spec.protocol.model_dump(mode="json"), "passes": ["latency"]}
    bare = with_passes(
        record.model_copy(update={"spec": record.spec.replace(protocol=protocol), "quality": None}),
        memory=None,
        energy=None,
        throughput=None,
    )
    for name in ("weights_bytes", "j_per_output_token", "perplexity", "peak_bytes"):
        assert reading(name, bare).reason.endswith("pass was not asked for"), name
    # Without a throughput pass in the spec the latency pass gives the headline rate.
    assert reading("decode_tokens_per_s", bare).value == pytest.approx(20.0)
