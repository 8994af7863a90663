"""Each exporter follows the definitions of the tool it writes for: published vectors, by hand.

The vectors are those of `tests/unit/test_timing_vectors.py`; what each tool calls by which name was
worked out from the tools' sources, which the exporters name.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from pytest_benchmark.stats import Stats

from compresskit.exchange import formats
from compresskit.exchange.exporters import llama_bench, mlperf, optimum, pytest_benchmark, vllm

from .conftest import VECTOR_1, golden, record_of

near = pytest.approx


def test_vector_1_pins_every_exporter(vector_1):
    """TTFT 100 ms, E2E 180; TPOT 20 and ITL 40 in vLLM; decode 50 tok/s; n/total 27.8."""
    (served,) = vllm.documents([vector_1])
    assert served["median_ttft_ms"] == near(100)
    assert served["mean_tpot_ms"] == near(20)
    assert served["mean_itl_ms"] == near(40)
    assert served["itls"] == [near([0.04, 0.04])]
    assert served["median_e2el_ms"] == near(180)
    assert served["output_throughput"] == near(27.7778, abs=1e-4)
    assert (served["completed"], served["total_output_tokens"]) == (1, 5)

    prompt, generation = llama_bench.rows([vector_1])
    assert prompt["samples_ns"] == [100_000_000]
    assert prompt["avg_ts"] == near(8 / 0.1)
    assert (generation["n_gen"], generation["n_depth"]) == (4, 8)
    assert generation["avg_ts"] == near(50)

    report = optimum.report(vector_1)
    assert report["prefill"]["latency"]["mean"] == near(0.1)
    assert report["prefill"]["throughput"] == {"unit": "samples/s", "value": near(10)}
    assert report["decode"]["latency"]["mean"] == near(0.08)
    assert report["decode"]["throughput"] == {"unit": "tokens/s", "value": near(50)}
    assert report["per_token"]["latency"]["values"] == near([0.04, 0.04])
    assert report["generate"]["throughput"]["value"] == near(1 / 0.18)

    found = {
        one["name"].split("[")[0]: one["stats"] for one in pytest_benchmark.benchmarks(vector_1)
    }
    assert {name: stats["mean"] for name, stats in found.items()} == {
        "ttft_s": near(0.1),
        "tpot_s": near(0.02),
        "e2e_s": near(0.18),
        "itl_s": near(0.04),
    }

    names = mlperf.result(vector_1)
    assert names["result_first_token_mean_latency_ns"] == 100_000_000
    assert names["result_time_to_output_token_mean"] == 20_000_000
    assert names["result_90.00_percentile_latency_ns"] == 180_000_000
    assert names["result_token_throughput"] == near(27.7778, abs=1e-4)


def test_vector_1_is_not_what_other_tools_would_call_so(vector_1):
    """E2E/n is 36 ms, n/decode 62.5 tok/s: nobody we write for means that."""
    text = "".join(
        json.dumps(one) for one in (*vllm.documents([vector_1]), *llama_bench.rows([vector_1]))
    )
    assert "62.5" not in text
    assert "36.0" not in text


def test_vector_2_percentiles_and_deviations_are_each_tools_own():
    record = record_of(*([(seconds, 1)] for seconds in range(1, 11)))
    (served,) = vllm.documents([record])
    assert [served[f"p{q}_ttft_ms"] for q in (50, 90, 95, 99)] == near([5500, 9100, 9550, 9910])
    assert served["std_ttft_ms"] == near(2872.281, abs=5e-4)  # ddof 0
    latency = optimum.report(record)["prefill"]["latency"]
    assert latency["stdev"] == near(2.872281, abs=5e-7)  # ddof 0
    assert [latency[key] for key in ("p50", "p90", "p95", "p99")] == near([5.5, 9.1, 9.55, 9.91])
    names = mlperf.result(record)
    shares = ("50.00", "90.00", "95.00", "99.00")
    keys = [f"result_first_token_{share}_percentile_latency_ns" for share in shares]
    assert [names[key] / 1e9 for key in keys] == [6, 10, 10, 10]
    prompt = next(llama_bench.rows([record]))
    assert prompt["stddev_ns"] == near(3.027650e9, rel=1e-6)  # ddof 1
    assert pytest_benchmark.describe(range(1, 11))["stddev"] == near(3.027650, abs=5e-7)


def test_vector_3_llama_bench_averages_rates_and_vllm_divides_totals():
    """100 tokens in 1 s and in 2 s: 75 tok/s for one, 66.67 for the other."""
    record = record_of([(1.0, 1), (2.0, 100)], [(1.0, 1), (3.0, 100)])
    *_, generation = llama_bench.rows([record])
    assert generation["n_gen"] == 100
    assert generation["avg_ts"] == near(75)
    totals = record_of([(0.01, 1), (1.0, 99)], [(0.01, 1), (2.0, 99)])
    (served,) = vllm.documents([totals])
    assert served["output_throughput"] == near(66.67, abs=0.005)


def test_vector_4_gaps_are_counted_once_and_hold_no_first_token():
    """A list extended by its own earlier content gives 1,750 gaps with a mean of 32.3 ms."""
    record = record_of(*[[(0.5 + 0.02 * step, 1) for step in range(32)]] * 10)
    latency = optimum.report(record)["per_token"]["latency"]
    assert (latency["count"], latency["mean"]) == (310, near(0.02))
    assert latency["p99"] == near(0.02)
    (served,) = vllm.documents([record])
    assert sum(map(len, served["itls"])) == 310
    assert served["p99_itl_ms"] == near(20)


def test_llama_bench_statistics_match_its_own_published_output():
    """Samples and averages of the sample output in llama-bench's README."""
    nanoseconds = (1075361300, 1065089400, 1071761200, 1081934900, 1089692600)
    record = record_of(*([(1.0, 1), (1.0 + ns / 1e9, 128)] for ns in nanoseconds))
    *_, row = llama_bench.rows([record])
    assert row["samples_ns"] == list(nanoseconds)
    assert (row["avg_ns"], row["n_gen"]) == (1076767880, 128)
    assert row["avg_ts"] == near(118.881588, abs=5e-7)
    assert row["stddev_ts"] == near(1.041811, abs=5e-7)
    assert row["stddev_ns"] == near(9449585, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 30])
def test_pytest_benchmark_statistics_match_its_own_class(count):
    """The oracle is pytest-benchmark itself, as installed."""
    dice = random.Random(count)
    oracle = Stats()
    oracle.data = [dice.lognormvariate(0, 1) for _ in range(count)]
    expected = {**oracle.as_dict()}
    found = pytest_benchmark.describe(oracle.data)
    assert list(found) == list(expected)
    if count == 1:
        # The tool writes 0 for the deviation of one value.
        assert found.pop("stddev") is None
        expected.pop("stddev")
    assert found == {
        key: near(value) if isinstance(value, float) else value for key, value in expected.items()
    }


def test_speculation_is_told_in_vllms_terms():
    """Two steps for 4 tokens, 6 drafted, 2 accepted: a third, and 1 + 2 / 2 tokens a step."""
    steps = {"per_step_drafted": ((0, 3, 3),), "per_step_accepted": ((0, 2, 0),)}
    record = record_of(VECTOR_1, drafted=6, accepted=2, **steps)
    (served,) = vllm.documents([record])
    assert served["spec_decode_acceptance_rate"] == near(100 / 3)
    assert served["spec_decode_acceptance_length"] == near(2.0)
    assert served["spec_decode_num_drafts"] == 2
    (plain,) = vllm.documents([record_of(VECTOR_1)])
    assert not [key for key in plain if key.startswith("spec_decode")]
    # Without the steps nobody knows how many of them drafted anything.
    (older,) = vllm.documents([record_of(VECTOR_1, drafted=6, accepted=2)])
    assert older["spec_decode_draft_tokens"] == 6
    assert "spec_decode_num_drafts" not in older


def test_a_step_without_a_draft_is_no_draft_to_vllm():
    steps = {"per_step_drafted": ((0, 0, 3),), "per_step_accepted": ((0, 0, 2),)}
    (served,) = vllm.documents([record_of(VECTOR_1, drafted=3, accepted=2, **steps)])
    assert served["spec_decode_num_drafts"] == 1
    assert served["spec_decode_acceptance_length"] == near(3.0)


def test_rows_of_a_batch_are_requests_of_their_own():
    (served,) = vllm.documents([record_of(VECTOR_1, batch=4)])
    assert (served["completed"], served["max_concurrency"]) == (4, 4)
    assert served["output_throughput"] == near(20 / 0.18)
    assert served["mean_tpot_ms"] == near(20)
    # llama-bench decodes one sequence, SingleStream sends one query: neither can say this.
    assert list(llama_bench.rows([record_of(VECTOR_1, batch=4)])) == []
    assert mlperf.result(record_of(VECTOR_1, batch=4)) is None


def test_one_token_has_no_time_per_output_token():
    record = record_of([(0.1, 1)], [(0.2, 1)])
    (served,) = vllm.documents([record])
    assert served["mean_tpot_ms"] is None
    assert served["mean_itl_ms"] is None
    assert mlperf.result(record)["result_time_to_output_token_mean"] is None
    assert [row["n_gen"] for row in llama_bench.rows([record])] == [0]
    assert optimum.report(record)["decode"]["latency"] is None


def test_what_was_not_measured_is_null_and_never_zero(vector_1):
    bare = vector_1.model_copy(update={"model": None, "environment": None, "setup": None})
    (served,) = vllm.documents([bare])
    for key in ("burstiness", "request_goodput", "queue_times", "max_output_tokens_per_s", "rtfx"):
        assert served[key] is None
    row = next(llama_bench.rows([bare]))
    for key in ("build_number", "model_n_params", "type_k", "n_gpu_layers", "stddev_ts"):
        assert row[key] is None
    report = optimum.report(golden("ngram"))
    assert report["decode"]["energy"] is None
    assert report["decode"]["efficiency"] is None
    assert report["decode"]["memory"]["max_allocated"] is None


def test_the_throughput_pass_times_no_gaps():
    first, second = vllm.documents([golden("int8")])
    assert (first["max_concurrency"], second["max_concurrency"]) == (1, 4)
    assert first["itls"] is not None
    assert second["itls"] is None
    assert second["mean_itl_ms"] is None
    assert second["mean_tpot_ms"] is not None


def test_measured_energy_is_kilowatt_hours_of_a_call():
    """120 J for 32,000 prompt and 400 delivered tokens; calls of 32 and 16 tokens."""
    report = optimum.report(golden("dense"))
    prefill = 120 / 32_000 * 32 / 3.6e6
    generate = 120 / 400 * 16 / 3.6e6
    assert report["prefill"]["energy"]["total"] == near(prefill)
    assert report["generate"]["energy"] == {
        "unit": "kWh",
        "cpu": near(generate),
        "ram": None,
        "gpu": None,
        "total": near(generate),
    }
    assert report["decode"]["efficiency"] == {
        "unit": "tokens/kWh",
        "value": near(15 / (generate - prefill)),
    }


def test_estimated_energy_is_not_exported_as_measured():
    report = optimum.report(golden("dense-prepacked"))
    assert golden("dense-prepacked").blocks[0].passes.energy.generate[0].reading.kind == "estimated"
    assert report["generate"]["energy"] is None


def test_memory_is_in_megabytes_of_its_own_window():
    report = optimum.report(golden("dense"))
    assert report["load_model"]["memory"]["max_ram"] == near(600)
    assert report["prefill"]["memory"]["max_ram"] == near(300)
    assert report["decode"]["memory"]["max_ram"] == near(250)
    assert report["generate"]["memory"] is None


def test_mlperf_names_say_that_they_are_no_mlperf_result(vector_1):
    document = json.loads(mlperf.render([vector_1]))
    assert next(iter(document)) == "notice"
    assert document["notice"].startswith("NOT an MLPerf result")
    assert all(one["notice"].startswith("NOT an MLPerf") for one in document["results"])
    assert "result_validity" not in document["results"][0]


@pytest.mark.parametrize("name", sorted(formats.EXPORTERS))
def test_every_exporter_gives_strict_json_and_no_numpy(name, vector_1):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = formats.exporter(name).render([vector_1])
    for document in text.splitlines() if name in ("llama-bench", "vllm") else [text]:
        json.loads(document, parse_constant=refuse)


def test_lines_hold_llama_benchs_keys_in_its_order(vector_1):
    row = next(llama_bench.rows([vector_1]))
    assert tuple(row) == llama_bench.FIELDS
    assert len(llama_bench.FIELDS) == 42  # 40 fields and two lists of samples


def test_numpy_agrees_on_what_vllm_calls_a_deviation():
    values = [0.1, 0.15, 0.4]
    (served,) = vllm.documents([record_of(*([(v, 1)] for v in values))])
    assert served["std_ttft_ms"] == near(1000 * np.std(values))
