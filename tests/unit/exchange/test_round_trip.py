"""What is exported and imported again is the same number, within the rounding of the format."""

from __future__ import annotations

import pytest

from compresskit.exchange import formats
from compresskit.metrics import METRICS

from .conftest import golden, record_of

RAGGED = record_of(
    [(0.10, 1), (0.14, 3), (0.19, 1)],
    [(0.11, 1), (0.15, 1), (0.21, 3)],
    [(0.09, 1), (0.16, 2), (0.20, 2)],
)
SPECULATED = record_of(
    [(0.10, 1), (0.14, 3), (0.19, 1)],
    drafted=5,
    accepted=2,
    per_step_drafted=((0, 3, 2),),
    per_step_accepted=((0, 2, 0),),
)


def back(record, tool: str):
    text = formats.exporter(tool).render([record])
    return formats.parse(text.encode(), tool, where="ours")


@pytest.mark.parametrize("record", [golden("dense"), RAGGED], ids=["synthetic", "ragged"])
def test_llama_bench_gives_our_own_rates_back(record):
    """Times are whole nanoseconds there."""
    prompt, generation = back(record, "llama-bench")
    expected = {
        "prefill_tokens_per_s": prompt,
        "decode_tokens_per_s_per_seq": generation,
        "tpot_s": generation,
    }
    for name, peer in expected.items():
        ours = METRICS[name].value(record).value
        assert peer.metrics[name].value == pytest.approx(ours, rel=1e-7)
    assert generation.new_tokens == prompt_tokens(record) - 1


def prompt_tokens(record) -> int:
    return sum(mark.tokens for mark in record.blocks[0].passes.latency.samples[0].arrivals)


@pytest.mark.parametrize("record", [golden("dense"), golden("ngram"), RAGGED, SPECULATED])
def test_vllm_gives_our_own_times_back(record):
    first, *_ = back(record, "vllm")
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        ours = METRICS[name].value(record).value
        assert first.metrics[name].value == pytest.approx(ours, rel=1e-12)
    for name in ("draft_acceptance_rate", "mean_acceptance_length"):
        if name in first.metrics:
            ours = METRICS[name].value(record).value
            assert first.metrics[name].value == pytest.approx(ours, rel=1e-12)


def test_speculation_survives_vllm():
    assert "draft_acceptance_rate" in back(golden("ngram"), "vllm")[0].metrics
    assert "mean_acceptance_length" in back(SPECULATED, "vllm")[0].metrics


def test_a_changed_time_does_not_come_back_unnoticed():
    """The negative control: another record gives other numbers."""
    (one, _), (other, _) = back(golden("dense"), "llama-bench"), back(RAGGED, "llama-bench")
    assert one.metrics["prefill_tokens_per_s"] != other.metrics["prefill_tokens_per_s"]
