"""Counts and digests: equal, or not."""

from __future__ import annotations

import pytest

from compresskit.compare import CHECKS

EXACT = {check.name for check in CHECKS if check.tier == "exact"}


@pytest.mark.parametrize("name", ["dense", "dense-prepacked", "int8", "ngram"])
@pytest.mark.parametrize("schema", ["v1", "v2"])
def test_identical_records_pass(bench, name, schema):
    record = bench.golden(name, schema)
    words = {outcome.word for outcome in bench.judge(record, record).values()}
    assert words <= {"same", "not compared", "inconclusive"}
    assert "same" in words


@pytest.mark.parametrize(("extra", "word"), [(1, "worse"), (-1, "better")])
def test_a_single_byte_of_weights_counts(bench, extra, word):
    base = bench.golden("int8")
    held = base.blocks[0].passes.memory.weights_bytes
    name = next(iter(held))
    outcomes = bench.judge(
        base, bench.memory(base, weights_bytes={**held, name: held[name] + extra})
    )
    assert outcomes["weights_bytes"].word == word
    assert outcomes["effective_bits_per_parameter"].word == word
    assert f"{name} {held[name]} -> {held[name] + extra}" in outcomes["weights_bytes"].reason
    failed = {metric for metric, outcome in outcomes.items() if outcome.failed}
    assert failed == (set() if extra < 0 else {"weights_bytes", "effective_bits_per_parameter"})


def test_bytes_that_move_between_classes_have_changed(bench):
    base = bench.golden("int8")
    held = base.blocks[0].passes.memory.weights_bytes
    moved = dict.fromkeys(held, 0) | {"dense": sum(held.values())}
    outcome = bench.judge(base, bench.memory(base, weights_bytes=moved))["weights_bytes"]
    assert outcome.word == "changed"


def test_a_token_more_in_the_cache_is_worse(bench):
    base = bench.golden("int8")
    memory = base.blocks[0].passes.memory
    held = memory.cache_bytes["keys_values"]
    per_token = held // (memory.batch * memory.tokens_in_cache)
    new = bench.memory(base, cache_bytes={"keys_values": held + per_token})
    outcome = bench.judge(base, new)["cache_bytes"]
    assert (outcome.word, outcome.base, outcome.new) == ("worse", held, held + per_token)


def test_a_cache_of_the_first_schema_is_compared_by_its_sum(bench):
    base = bench.golden("int8")
    total = sum(base.blocks[0].passes.memory.cache_bytes.values())
    old = bench.memory(base, cache_bytes={"held": total})
    assert bench.judge(old, base)["cache_bytes"].word == "same"
    assert bench.judge(bench.memory(base, cache_bytes={"held": total - 1}), base)[
        "cache_bytes"
    ].word == ("worse")


def test_another_model_behind_the_same_name_has_changed(bench):
    base = bench.golden("int8")
    assert bench.judge(base, bench.memory(base, parameters=7))["parameters"].word == "changed"


@pytest.mark.parametrize(
    ("field", "metric", "more"),
    [
        ("forwards", "forwards", "worse"),
        ("drafted", "drafted", "worse"),
        ("accepted", "accepted", "better"),
    ],
)
def test_forward_passes_and_drafts_are_counted_per_repetition(bench, field, metric, more):
    base = bench.golden("ngram")

    def shifted(by):
        return lambda sample, index: sample.model_copy(
            update={field: getattr(sample, field) + (by if index == 2 else 0)}
        )

    less = {"worse": "better", "better": "worse"}[more]
    outcome = bench.judge(base, bench.samples(base, shifted(1)))[metric]
    assert outcome.word == more
    assert "differ, first latency pass, repetition 3" in outcome.reason
    assert bench.judge(base, bench.samples(base, shifted(-1)))[metric].word == less


def test_an_equal_sum_of_other_counts_has_changed(bench):
    base = bench.golden("ngram")

    def swap(sample, index):
        by = {0: 1, 1: -1}.get(index, 0)
        return sample.model_copy(update={"accepted": sample.accepted + by})

    assert bench.judge(base, bench.samples(base, swap))["accepted"].word == "changed"


def test_one_changed_output_is_found_and_named(bench):
    base = bench.golden("int8")

    def change(sample, index):
        return sample.model_copy(update={"tokens_sha256": "f" * 16}) if index == 4 else sample

    outcome = bench.judge(base, bench.samples(base, change))["outputs"]
    assert outcome.word == "changed"
    assert outcome.new == "f" * 16
    assert "first latency pass, repetition 5" in outcome.reason


def test_changed_greedy_outputs_are_found(bench):
    base = bench.golden("int8")
    greedy = base.quality.greedy
    hashes = ("0" * 64, *greedy.outputs_sha256[1:])
    quality = base.quality.model_copy(
        update={"greedy": greedy.model_copy(update={"outputs_sha256": hashes})}
    )
    outcome = bench.judge(base, base.model_copy(update={"quality": quality}))["greedy_outputs"]
    assert outcome.word == "changed"
    assert "1 of 4 prompts" in outcome.reason


def test_another_kernel_is_named(bench):
    base = bench.golden("int8")
    new = base.model_copy(update={"kernels": {"int8_matmul": "triton"}})
    outcome = bench.judge(base, new)["kernels"]
    assert (outcome.word, outcome.base, outcome.new) == (
        "changed",
        "int8_matmul: reference",
        "int8_matmul: triton",
    )


def test_a_batch_size_that_no_longer_fits_is_worse(bench):
    base = bench.golden("int8")
    first, second = base.blocks[0].passes.throughput
    gone = second.model_copy(update={"samples": (), "reason": "batch 4 does not fit into memory"})
    outcome = bench.judge(base, bench.passes(base, throughput=(first, gone)))["passes"]
    assert outcome.word == "worse"
    assert "batch 4 does not fit" in outcome.reason


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("device", {"name": "Another CPU"}, "machine differs: base 'Synthetic CPU, 2 CPUs'"),
        ("device", {"threads": 2}, "threads differs: base 1, new 2"),
        ("environment", {"packages": {"torch": "9.9"}}, "torch differs: base"),
        ("environment", {"packages": {}}, "torch is not stated in the new record"),
    ],
)
def test_elsewhere_only_what_rounding_cannot_touch_is_compared(bench, part, change, says):
    base = bench.golden("int8")
    new = base.model_copy(update={part: getattr(base, part).model_copy(update=change)})
    new = bench.memory(new, parameters=7)
    outcomes = bench.judge(base, new)
    for metric in ("outputs", "forwards", "greedy_outputs"):
        assert outcomes[metric].word == "not compared"
        assert says in outcomes[metric].reason
    assert outcomes["parameters"].word == "changed"
    assert outcomes["weights_bytes"].word == outcomes["tokens"].word == "same"
    assert outcomes["nll_nats"].word == "same"


def test_outputs_of_unlike_specs_are_not_compared(bench):
    outcomes = bench.judge(bench.golden("dense"), bench.golden("int8"))
    assert outcomes["outputs"].word == "not compared"
    assert "spec differs" in outcomes["outputs"].reason
    assert outcomes["weights_bytes"].word == "better"


def test_a_tier_can_be_left_out(bench):
    record = bench.golden("int8")
    assert set(bench.judge(record, record, tiers=["exact"])) <= EXACT | {"status"}
