"""Published and hand-calculated timing vectors that any LLM benchmark must agree on.

Sources
    vector 1   the worked example in vLLM's benchmark documentation (chunks at 100, 140 and 180 ms
               that carry 1, 3 and 1 tokens); what other tools call by the same names is arithmetic
    vector 2   numpy's percentiles (linear, type 7) and standard deviations of 1..10
    vector 3   100 tokens in 1 s and 100 tokens in 2 s: a ratio of totals against a mean of ratios
    vector 4   ten requests of 500 ms prefill and 31 gaps of 20 ms; a list that is extended once
               too often by its own content (seen in a published tool) gives 1,750 gaps with a
               mean of 32.3 ms instead

The numbers below were worked out from the definitions by hand, not taken from compresskit.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from compresskit import store
from compresskit.metrics import METRICS, Timed
from compresskit.metrics.formulae import (
    decode_rate,
    decode_rate_of_batch,
    decode_s,
    e2e_s,
    gaps_s,
    prefill_rate,
    step_s,
    tpot_s,
    ttft_s,
)
from compresskit.record import Arrival, Measured, Record, Sample
from compresskit.stats import mean, percentile

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"


def timed(*arrivals: tuple[float, int], batch: int = 1, prompt: int = 8) -> Timed:
    marks = tuple(Arrival(*mark) for mark in arrivals)
    return Timed(Sample(arrivals=marks, forwards=len(marks)), batch, prompt)


def with_latency(*ones: Timed, passes: tuple[str, ...] = ("latency",)) -> Record:
    """The synthetic dense record with other repetitions in its latency pass."""
    record = store.load(GOLDEN / "synthetic-dense.json")
    block = record.blocks[0]
    changed = block.passes.latency.model_copy(
        update={"samples": tuple(one.sample for one in ones), "batch": ones[0].batch}
    )
    only = block.passes.model_copy(update={"latency": changed, "throughput": None})
    protocol = {**record.spec.protocol.model_dump(mode="json"), "passes": passes}
    return record.model_copy(
        update={
            "blocks": (block.model_copy(update={"passes": only}),),
            "spec": record.spec.replace(protocol=protocol),
        }
    )


def value(name: str, record: Record) -> float:
    reading = METRICS[name].value(record)
    assert isinstance(reading, Measured)
    return reading.value


VECTOR_1 = timed((0.100, 1), (0.140, 3), (0.180, 1))


def test_vector_1_formulae():
    assert ttft_s(VECTOR_1) == pytest.approx(0.100)
    assert e2e_s(VECTOR_1) == pytest.approx(0.180)
    assert decode_s(VECTOR_1) == pytest.approx(0.080)
    assert tpot_s(VECTOR_1) == pytest.approx(0.020)
    assert gaps_s(VECTOR_1) == pytest.approx([0.040, 0.040])
    assert step_s(VECTOR_1) == pytest.approx(0.040)
    assert decode_rate(VECTOR_1) == pytest.approx(50.0)


def test_vector_1_metrics_of_a_record():
    record = with_latency(VECTOR_1)
    expected = {
        "ttft_s": 0.100,
        "e2e_s": 0.180,
        "tpot_s": 0.020,
        "itl_s": 0.040,
        "step_s": 0.040,
        "tokens_per_step": 2.0,
        "decode_tokens_per_s_per_seq": 50.0,
        "decode_tokens_per_s": 50.0,
        "output_tokens_per_s": 5 / 0.180,
    }
    assert {name: value(name, record) for name in expected} == pytest.approx(expected)


def test_vector_1_is_not_what_other_tools_call_by_these_names():
    """E2E/n (36 ms), n/decode (62.5 tok/s) and n/c (1.667) are other quantities."""
    record = with_latency(VECTOR_1)
    assert value("tpot_s", record) != pytest.approx(0.036)
    assert value("decode_tokens_per_s", record) != pytest.approx(62.5)
    assert value("tokens_per_step", record) != pytest.approx(5 / 3)


def test_vector_2():
    values = list(range(1, 11))
    assert [percentile(values, q) for q in (50, 90, 95, 99)] == [5.5, 9.1, 9.55, 9.91]
    assert statistics.stdev(values) == pytest.approx(3.027650, abs=5e-7)
    assert np.std(values) == pytest.approx(2.872281, abs=5e-7)


def test_vector_3_a_rate_is_a_ratio_of_totals():
    fast, slow = timed((0.01, 1), (1.0, 99)), timed((0.01, 1), (2.0, 99))
    record = with_latency(fast, slow)
    assert value("output_tokens_per_s", record) == pytest.approx(66.67, abs=0.005)
    assert mean(METRICS["output_tokens_per_s"].samples(record)) == pytest.approx(75.0)


def test_vector_4_gaps_never_hold_the_first_token():
    request = timed(*((0.5 + 0.02 * step, 1) for step in range(32)))
    record = with_latency(*[request] * 10)
    gaps = METRICS["itl_s"].samples(record)
    assert len(gaps) == 310
    assert mean(gaps) == pytest.approx(0.020)
    assert max(gaps) == pytest.approx(0.020)


def test_prefill_counts_tokens_not_sequences():
    one = timed((0.25, 1), (0.30, 1), batch=4, prompt=128)
    assert prefill_rate(one) == pytest.approx(4 * 128 / 0.25)


def test_a_batch_decodes_b_tokens_per_step():
    one = timed((0.1, 1), (0.2, 10), batch=4)
    assert decode_rate(one) == pytest.approx(100.0)
    assert decode_rate_of_batch(one) == pytest.approx(400.0)
