"""Every rule of validity: what makes it speak, and that it is silent otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit import store
from compresskit.record import Arrival, GpuState, Record, Sample, Telemetry, Turn
from compresskit.validity import RULES, VERSION, judge

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"


def golden(name: str) -> Record:
    """A synthetic record of an earlier schema, its distances taken from its own baseline."""
    record = store.load(GOLDEN / f"synthetic-{name}.json")
    if record.quality is None or record.quality.fidelity is None:
        return record
    base = {"baseline_digest": record.spec.baseline().digest()}
    fidelity = record.quality.fidelity.model_copy(update=base)
    quality = record.quality.model_copy(update={"fidelity": fidelity})
    return record.model_copy(update={"quality": quality})


def codes(record: Record) -> list[str]:
    return [reason.partition(":")[0] for reason in judge(record).reasons]


def with_block(record: Record, **changes) -> Record:
    block = record.blocks[0].model_copy(update=changes)
    return record.model_copy(update={"blocks": (block,)})


def with_latency(record: Record, **changes) -> Record:
    """The record with a changed latency pass and no throughput pass."""
    passes = record.blocks[0].passes
    latency = passes.latency.model_copy(update=changes)
    passes = passes.model_copy(update={"latency": latency, "throughput": None})
    return with_block(record, passes=passes)


def lasting(*seconds: float, waited: float | None = None) -> tuple[Sample, ...]:
    """Repetitions of 16 tokens that end after the given times."""
    return tuple(
        Sample(arrivals=(Arrival(0.1, 1), Arrival(s, 15)), forwards=16, waited=waited)
        for s in seconds
    )


def turns(*yardsticks: float | None) -> tuple[Turn, ...]:
    return tuple(
        Turn(round=i, position=0, started=float(i), yardstick=pace)
        for i, pace in enumerate(yardsticks)
    )


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


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_tokens_that_take_no_time_are_invalid(first, last):
    instant = Sample(arrivals=(Arrival(first, 1), Arrival(last, 15)), forwards=16)
    record = with_latency(golden("dense"), samples=(*lasting(1.0, 1.0, 1.0), instant))
    assert codes(record)[0] == "zero_duration"
    assert judge(record).verdict == "INVALID"


def test_a_negative_setup_is_invalid():
    record = golden("dense")
    setup = record.setup.model_copy(update={"load_seconds": -0.5})
    assert codes(record.model_copy(update={"setup": setup})) == ["negative_duration"]


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


SLOWER = (1.0, 1.02, 1.07, 1.13, 1.15)


def test_a_trend_that_the_machine_shares_is_the_machines():
    record = with_latency(golden("dense"), samples=lasting(*SLOWER))
    drifted = with_block(record, turns=turns(*(0.01 * pace for pace in SLOWER)))
    assert codes(drifted) == ["machine_drift"]
    # Negative control: on a steady machine the same samples are the artefact's own trend.
    steady = with_block(record, turns=turns(*[0.01] * 5))
    assert codes(steady) == ["not_stationary"]


def test_a_drifting_machine_does_not_excuse_a_trend_of_another_size():
    record = with_latency(golden("dense"), samples=lasting(1.0, 1.0, 1.2, 1.4, 1.4))
    record = with_block(record, turns=turns(0.010, 0.010, 0.0106, 0.0112, 0.0112))
    assert codes(record) == ["not_stationary", "machine_drift"]


@pytest.mark.parametrize("pace", [0.0, -0.01])
def test_a_yardstick_that_takes_no_time_is_invalid(pace):
    record = with_latency(golden("dense"), samples=lasting(1.0, 1.0, 1.0, 1.0))
    record = with_block(record, turns=turns(0.01, 0.01, pace, 0.01))
    assert codes(record) == ["zero_duration"]
    assert judge(record).verdict == "INVALID"


def test_a_yardstick_that_was_not_read_is_no_evidence():
    record = with_latency(golden("dense"), samples=lasting(1.0, 1.0, 1.0, 1.0))
    assert codes(with_block(record, turns=turns(0.01, None, 0.02, None))) == []


def test_measuring_cold_warns():
    record = with_latency(golden("dense"), warmups=())
    assert codes(record) == ["no_warmup"]


@pytest.mark.parametrize(
    ("waited", "expected", "said"),
    [
        (None, [], ""),
        (0.02, [], ""),
        (0.1, ["contended"], "10% of its time"),
        (0.4, ["contended"], "as much about the others"),
    ],
)
def test_waiting_for_a_cpu_warns_and_never_more(waited, expected, said):
    record = with_latency(golden("dense"), samples=lasting(1.0, 1.0, 1.0, waited=waited))
    assert codes(record) == expected
    assert said in " ".join(judge(record).reasons)
    assert judge(record).verdict != "INVALID"


def with_load(load: float, cpus: int | None) -> Record:
    record = golden("dense")
    environment = record.environment.model_copy(update={"cpu_count": cpus})
    record = with_block(record, load_average=(load, load, load))
    return record.model_copy(update={"environment": environment})


@pytest.mark.parametrize(
    ("load", "cpus", "expected"),
    [(3.5, 2, ["machine_loaded"]), (2.0, 2, []), (3.5, None, []), (3.5, 8, [])],
)
def test_a_load_above_the_number_of_cpus_warns(load, cpus, expected):
    assert codes(with_load(load, cpus)) == expected


def test_a_load_in_the_middle_of_the_session_warns_too():
    looks = (Telemetry(seconds=0.0, load_average=0.5), Telemetry(seconds=9.0, load_average=6.0))
    assert codes(with_block(golden("dense"), telemetry=looks)) == ["machine_loaded"]


def gpu_looks(*states: dict) -> Record:
    """The record with one look at one GPU every ten seconds."""
    looks = tuple(
        Telemetry(seconds=10.0 * i, gpus=(GpuState(device="a1", **state),))
        for i, state in enumerate(states)
    )
    return with_block(golden("dense"), telemetry=looks)


@pytest.mark.parametrize(
    ("policy", "grown", "verdict"),
    [
        ("thermal", 5.0, "INVALID"),
        ("power", 5.0, "WARN"),
        ("thermal", 0.05, "VALID"),
        ("power", 0.0, "VALID"),
    ],
)
def test_clocks_that_were_held_down_during_the_session(policy, grown, verdict):
    # Seconds count since the driver was loaded: only their growth means something.
    record = gpu_looks(
        {"throttled_seconds": {policy: 1000.0}},
        {"throttled_seconds": {policy: 1000.0 + grown}, "power_limit_watts": 700.0},
    )
    assert judge(record).verdict == verdict
    assert codes(record) == ([] if verdict == "VALID" else ["throttled"])
    if (policy, verdict) == ("power", "WARN"):
        assert "(limit 700 W)" in judge(record).reasons[0]


def test_an_active_reason_for_less_clock_warns():
    record = gpu_looks({}, {"throttle": ("hw_thermal", "power_cap")}, {})
    assert codes(record) == ["throttled"]
    assert "hw_thermal, power_cap" in judge(record).reasons[0]


@pytest.mark.parametrize(("foreign", "verdict"), [(1, "INVALID"), (0, "VALID"), (None, "VALID")])
def test_a_process_of_others_on_the_gpu_is_invalid(foreign, verdict):
    record = gpu_looks({}, {"foreign_processes": foreign}, {})
    assert judge(record).verdict == verdict


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("sm_clock_mhz", (345, 1980, 1980, 1700, 1500, 1500), ["clock_drift"]),
        ("sm_clock_mhz", (345, 1980, 1980, 1980, 1965, 1980), []),
        ("temperature_c", (30, 45, 46, 55, 68, 69), ["temperature_drift"]),
        ("temperature_c", (30, 45, 46, 47, 48, 48), []),
        # Three looks are too few to speak of a trend.
        ("temperature_c", (30, 45, 70), []),
    ],
)
def test_a_gpu_that_is_another_at_the_end_warns(key, values, expected):
    record = gpu_looks(*({key: float(value)} for value in values))
    assert codes(record) == expected


@pytest.mark.parametrize(
    ("variables", "threads", "expected"),
    [
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, 1, []),
        ({}, 1, []),
        ({"OMP_NUM_THREADS": "8"}, 1, ["threads_mismatch"]),
        ({}, 4, ["threads_mismatch"]),
        ({}, None, []),
    ],
)
def test_the_number_of_threads_is_what_the_record_says(variables, threads, expected):
    record = golden("dense")
    changes = {
        "environment": record.environment.model_copy(update={"variables": variables}),
        "device": record.device.model_copy(update={"threads": threads}),
    }
    assert codes(record.model_copy(update=changes)) == expected


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


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"prefix_cache_hits": 3}, ["prefix_cache_hit"]),
        ({"prefix_cache_hits": 0}, []),
        ({"prefix_cache_hits": 3, "prefix_cache": "on"}, []),
    ],
)
def test_an_undeclared_hit_of_a_prefix_cache_warns(facts, expected):
    assert codes(golden("dense").model_copy(update={"facts": facts})) == expected


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


@pytest.mark.parametrize(("products", "found"), [(29, True), (3, False)])
def test_dense_products_of_quantised_layers_are_found_out(products, found):
    profile = {"dense_products": products, "dense_layers": 3}
    for parameters in (10, 0):
        facts = {"quantized_parameters": parameters, "profile": profile}
        record = golden("dense").model_copy(update={"facts": facts})
        assert ("kernel_not_engaged" in codes(record)) is (found and parameters > 0)


@pytest.mark.parametrize("same", [True, False])
def test_calibrating_on_the_evaluation_text_is_invalid(same):
    record = golden("dense")
    sha256 = record.quality.likelihood.text.sha256 if same else "1" * 64
    facts = {"calibration": {"text": "x", "text_sha256": sha256}}
    record = record.model_copy(update={"facts": facts})
    assert ("calibrated_on_evaluation" in codes(record)) is same
    assert judge(record).verdict == ("INVALID" if same else "VALID")
