"""Every rule of validity: what makes it speak, and that it is silent otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit import store
from compresskit.record import Arrival, Record, Sample
from compresskit.validity import RULES, VERSION, judge

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"


def golden(name: str) -> Record:
    return store.load(GOLDEN / f"synthetic-{name}.json")


def codes(record: Record) -> list[str]:
    return [reason.partition(":")[0] for reason in judge(record).reasons]


def with_latency(record: Record, **changes) -> Record:
    """The record with a changed latency pass and no throughput pass."""
    block = record.blocks[0]
    latency = block.passes.latency.model_copy(update=changes)
    passes = block.passes.model_copy(update={"latency": latency, "throughput": None})
    return record.model_copy(update={"blocks": (block.model_copy(update={"passes": passes}),)})


def lasting(*seconds: float) -> tuple[Sample, ...]:
    """Repetitions of 16 tokens that end after the given times."""
    return tuple(Sample(arrivals=(Arrival(0.1, 1), Arrival(s, 15)), forwards=16) for s in seconds)


def test_a_sound_record_is_valid():
    verdict = judge(golden("dense"))
    assert (verdict.verdict, verdict.reasons, verdict.rules) == ("VALID", (), VERSION)


@pytest.mark.parametrize("status", ["skipped", "failed"])
def test_a_run_that_did_not_end_is_invalid_for_its_own_reason(status):
    record = golden(status)
    verdict = judge(record)
    assert verdict.verdict == "INVALID"
    assert verdict.reasons == (f"{status}: {record.reason}",)


def test_a_length_that_was_not_asked_for_is_invalid():
    verdict = judge(golden("short"))
    assert verdict.verdict == "INVALID"
    assert "osl_mismatch: the latency pass delivered 11 tokens per row instead of 16" in (
        verdict.reasons
    )


def test_a_pass_of_another_length_is_invalid():
    record = with_latency(golden("dense"), new_tokens=8)
    assert judge(record).verdict == "INVALID"
    assert codes(record) == ["osl_mismatch"]


def test_time_that_runs_backwards_is_invalid():
    backwards = Sample(arrivals=(Arrival(0.2, 1), Arrival(0.1, 15)), forwards=16)
    record = with_latency(golden("dense"), samples=(*lasting(0.2, 0.2, 0.2), backwards))
    assert "clock_not_monotonic" in codes(record)
    assert judge(record).verdict == "INVALID"


def test_a_simulated_saving_must_not_have_a_speed():
    record = golden("dense").model_copy(update={"simulated": ("kv/fake",)})
    assert judge(record).verdict == "INVALID"
    assert codes(record) == ["simulated_speed"]
    # Quality alone is fine.
    assert "simulated_speed" not in codes(golden("simulated"))


def test_two_repetitions_are_too_few():
    record = with_latency(golden("dense"), samples=lasting(1.0, 1.0))
    assert judge(record).verdict == "WARN"
    assert codes(record) == ["too_few_samples"]


def test_repetitions_of_several_blocks_count_together():
    record = with_latency(golden("dense"), samples=lasting(1.0, 1.0))
    record = record.model_copy(update={"blocks": record.blocks * 2})
    assert codes(record) == []


def test_wild_repetitions_warn():
    record = with_latency(golden("dense"), samples=lasting(1.0, 2.0, 1.0, 2.0, 1.0))
    assert "high_cv" in codes(record)
    assert judge(record).verdict == "WARN"


def test_prompts_that_speculate_unevenly_are_no_unrest():
    samples = tuple(
        Sample(arrivals=(Arrival(0.05, 1), Arrival(0.05 * n, 15)), forwards=n)
        for n in (16, 6, 14, 5, 10)
    )
    assert codes(with_latency(golden("dense"), samples=samples)) == []


def test_a_trend_warns_although_the_spread_is_small():
    record = with_latency(golden("dense"), samples=lasting(1.0, 1.02, 1.07, 1.13, 1.15))
    assert codes(record) == ["not_stationary"]
    assert "+13% from start to end" in judge(record).reasons[0]


def test_one_outlier_is_no_trend():
    record = with_latency(golden("dense"), samples=lasting(1.0, 1.0, 1.3, 1.0, 1.0))
    assert codes(record) == []


def test_measuring_cold_warns():
    record = with_latency(golden("dense"), warmups=())
    assert codes(record) == ["no_warmup"]


def with_load(load: float, cpus: int | None) -> Record:
    record = golden("dense")
    block = record.blocks[0].model_copy(update={"load_average": (load, load, load)})
    environment = record.environment.model_copy(update={"cpu_count": cpus})
    return record.model_copy(update={"blocks": (block,), "environment": environment})


@pytest.mark.parametrize(
    ("load", "cpus", "expected"),
    [(3.5, 2, ["machine_loaded"]), (2.0, 2, []), (3.5, None, []), (3.5, 8, [])],
)
def test_a_load_above_the_number_of_cpus_warns(load, cpus, expected):
    assert codes(with_load(load, cpus)) == expected


def test_the_reference_is_the_product_on_the_cpu_but_not_on_a_gpu():
    record = golden("int8")
    assert record.kernels == {"int8_matmul": "reference"}
    assert codes(record) == []
    gpu = record.device.model_copy(update={"kind": "cuda"})
    assert codes(record.model_copy(update={"device": gpu})) == ["kernel_not_engaged"]


@pytest.mark.parametrize("kernels", [{"int8_matmul": "reference"}, {}])
def test_a_promised_kernel_that_did_not_run_warns(kernels):
    facts = {"promised_kernels": ["int8_matmul"]}
    record = golden("int8").model_copy(update={"facts": facts, "kernels": kernels})
    assert codes(record) == ["kernel_not_engaged"]


def test_distances_from_another_baseline_warn():
    record = golden("int8")
    fidelity = record.quality.fidelity.model_copy(update={"baseline_digest": "0" * 12})
    quality = record.quality.model_copy(update={"fidelity": fidelity})
    assert codes(record.model_copy(update={"quality": quality})) == ["protocol_mismatch"]


def test_quality_of_random_weights_warns():
    record = golden("int8")
    model = record.model.model_copy(update={"baseline": "random"})
    assert codes(record.model_copy(update={"model": model})) == ["random_weights"]


def test_what_a_method_wants_said_is_said():
    verdict = judge(golden("simulated"))
    assert verdict.verdict == "WARN"
    assert verdict.reasons == ("warning: the cache is rounded, not packed",)


def test_fatal_reasons_come_first_and_each_reason_once():
    record = with_latency(golden("short"), warmups=())
    record = record.model_copy(update={"blocks": record.blocks * 2})
    assert codes(record) == ["osl_mismatch", "no_warmup"]


def test_every_rule_says_what_it_is_for():
    assert all(rule.__doc__ for rule in RULES)
