"""Sizes of caches: what was asked for, what is held, what is read; golden numbers by hand."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from compresskit import store
from compresskit.hf.cache import cache_bytes, new_dynamic
from compresskit.measure import passes
from compresskit.measure.memory.arrivals import Arrivals
from compresskit.measure.memory.moved import moved_bytes
from compresskit.measure.memory.request import memory_pass
from compresskit.methods.kv.none import NoCache
from compresskit.metrics import METRICS
from compresskit.record import Block, Measured, MemoryPass, ModelFacts, Passes, Phase, Record
from compresskit.report import join, legend, memory as reports, table
from compresskit.report.cells import text
from compresskit.runner import finish
from compresskit.spec import MethodSpec, ProtocolSpec, RunSpec, SamplingSpec, WorkloadSpec
from compresskit.units import Unit

T = 4096
NUMBERS = 2 * T  # one layer, one head, dimension 1


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def record(
    *,
    held=None,
    nominal=None,
    dense=True,
    dtype="float16",
    moved=None,
    simulated=(),
    facts=None,
    phases=None,
    stack=True,
):
    """The record of one run with a cache method; `held` by kind in bytes."""
    spec = RunSpec().replace(stack=(MethodSpec(name="kv/dynamic"),) if stack else ())
    memory = MemoryPass(
        batch=1,
        tokens_in_cache=T,
        weights_bytes={"dense": 1000},
        parameters=500,
        cache_bytes=held or {"keys_values": 2 * NUMBERS},
        dense_cache={"bytes": 2 * NUMBERS, "numbers": NUMBERS} if dense else None,
        moved_bytes=moved,
        phases=phases or {},
    )
    model = ModelFacts(
        kind="tiny",
        revision="1",
        baseline="random",
        architecture="Llama",
        parameters=500,
        dtype=dtype,
        tokenizer_sha256="0" * 64,
    )
    known = {} if nominal is None else {"cache": "words", "cache_nominal": nominal}
    return finish(
        Record(
            digest=spec.digest(),
            label=spec.label(),
            status="ok",
            spec=spec,
            started_at="2026-01-01T00:00:00+00:00",
            model=model,
            simulated=simulated,
            facts={**known, **(facts or {})},
            blocks=(Block(started_at="2026-01-01T00:00:00+00:00", passes=Passes(memory=memory)),),
        )
    )


def reading(name, one):
    return METRICS[name].value(one)


def value(name, one):
    return reading(name, one).value


# The model's own cache


def heard(config, *, heads, width, dtype, batch=1):
    """Arrivals of one token in every layer of a cache."""
    cache, arrivals = new_dynamic(config), Arrivals()
    arrivals.listen(cache)
    rows = torch.zeros(batch, heads, 1, width, dtype=dtype)
    for layer in range(config.num_hidden_layers):
        cache.update(rows, rows, layer)
    arrivals.stop()
    return arrivals


SMOL = LlamaConfig(
    num_hidden_layers=30,
    hidden_size=576,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=64,
    vocab_size=8,
)


def test_the_baseline_counts_key_value_heads_in_the_models_type():
    """46,080 B a token and 180.6 MiB at 4110 of them: 2 * 30 * 3 * 64 * 4."""
    arrivals = heard(SMOL, heads=3, width=64, dtype=torch.float32)
    assert arrivals.dense(SMOL, 1) == {"bytes": 46_080, "numbers": 11_520}
    assert arrivals.dense(SMOL, 4110)["bytes"] / 2**20 == pytest.approx(180.6, abs=0.05)
    half = heard(SMOL, heads=3, width=64, dtype=torch.bfloat16, batch=2)
    assert half.dense(SMOL, 1) == {"bytes": 46_080, "numbers": 23_040}
    # Negative control: with query heads it would be three times that.
    wrong = heard(SMOL, heads=9, width=64, dtype=torch.float32)
    assert wrong.dense(SMOL, 1)["bytes"] == 3 * 46_080


@pytest.mark.parametrize("length", [9, 40])
def test_the_baseline_is_what_a_dense_cache_holds(lab, architecture, length):
    """Grouped heads and sliding windows included; what a slice keeps alive beside it is slack."""
    system = lab.system(architecture)
    cache, arrivals = system.new_cache(length), Arrivals()
    arrivals.listen(cache)
    system.step(lab.prompt(length), cache)
    held = cache_bytes(cache)
    assert arrivals.dense(system.model.config, length)["bytes"] == held["keys_values"]
    # A sliding layer keeps its window's size in a tensor of 8 bytes.
    assert set(held) <= {"keys_values", "slack", "other"}
    longer = arrivals.dense(system.model.config, length + 1)["bytes"]
    assert longer > held["keys_values"]


def test_listening_leaves_the_cache_as_it_was(lab):
    system = lab.system("llama")
    cache, arrivals = system.new_cache(20), Arrivals()
    before = set(vars(cache))
    arrivals.listen(cache)
    assert set(vars(cache)) == before | {"update"}
    arrivals.stop()
    assert set(vars(cache)) == before
    assert arrivals.dense(system.model.config, 20) is None  # nothing arrived, nothing is known


# Ratios


def test_int8_with_float32_scales():
    """12,240 B a token in place of 46,080: 3.76 times below float32, 1.88 below bfloat16."""
    held = {"codes": 11_520, "scales": 720}
    for dtype, dense, ratio in (("float32", 46_080, 3.76), ("bfloat16", 23_040, 1.88)):
        one = record(held=held, nominal={"bits": 8}, dtype=dtype)
        memory = one.blocks[0].passes.memory.model_copy(
            update={"dense_cache": {"bytes": dense, "numbers": 11_520}}
        )
        passes_ = Passes(memory=memory)
        one = one.model_copy(
            update={"blocks": (one.blocks[0].model_copy(update={"passes": passes_}),)}
        )
        assert value("cache_achieved_ratio", one) == pytest.approx(ratio, abs=0.01)
        assert value("cache_effective_bits", one) == 8.5
        assert value("cache_nominal_ratio", one) == {"float32": 4, "bfloat16": 2}[dtype]


@pytest.mark.parametrize(
    ("bits", "effective", "ratio"), [(2, 3.203, 5.00), (4, 5.172, 3.09)], ids=["2 bit", "4 bit"]
)
def test_the_published_sizes_of_kivi(bits, effective, ratio):
    """Groups of 32 with a 16-bit scale and minimum, the last 128 values in 16 bits, 4096 tokens.

    The table of effective bits is arithmetic on the paper's layout (arXiv 2402.02750): keys are all
    coded at a multiple of 128, values but for the last 128 rows.
    """
    coded = T + (T - 128)
    held = {
        "codes": coded * bits // 8,
        "scales": coded * 4 // 32,  # two 16-bit numbers a group
        "residual": 128 * 2,
    }
    one = record(held=held, nominal={"bits": bits})
    assert value("cache_effective_bits", one) == pytest.approx(effective, abs=5e-4)
    assert value("cache_achieved_ratio", one) == pytest.approx(ratio, abs=5e-3)
    # "2-bit" asks for eight times and reaches five.
    assert value("cache_nominal_ratio", one) == 16 / bits


@pytest.mark.parametrize(
    ("nominal", "expected"),
    [
        ({"keep_share": 0.25}, 4),
        ({"keep_share": 1.0}, 1),
        ({"keep_tokens": 1024}, 4),
        ({"keep_tokens": 2 * T}, 1),
        ({"bits": 4}, 4),
        ({"bits": [8, 2]}, 3.2),
        ({"keep_share": 0.5, "bits": 4}, 8),
    ],
    ids=str,
)
def test_what_was_asked_for(nominal, expected):
    found = reading("cache_nominal_ratio", record(nominal=nominal))
    assert (found.value, found.unit) == (pytest.approx(expected), Unit.RATIO)


@pytest.mark.parametrize(
    ("nominal", "reason"),
    [
        ({"keep_tokens": 0}, "no token is kept"),
        ({"keep_share": 0}, "no token is kept"),
        ({"bits": "two"}, "are not known"),
        ({"bits": [4, None]}, "are not known"),
        ({"read_tokens": 9}, "does not ask for fewer"),
        ("a quarter", "not told in shares"),
        (None, "the model's own"),
    ],
    ids=str,
)
def test_what_cannot_be_told_as_a_ratio_has_a_reason(nominal, reason):
    assert reason in reading("cache_nominal_ratio", record(nominal=nominal)).reason


def test_masked_rows_are_still_held():
    masked = record(
        held={"keys_values": NUMBERS}, nominal={"keep_share": 0.5}, simulated=("kv/masked",)
    )
    assert value("cache_achieved_ratio", masked) == 1.0
    assert value("cache_effective_bits", masked) == 16
    assert value("cache_nominal_ratio", masked) == 2
    # A simulated saving of the weights says nothing about the cache.
    weights = record(
        held={"keys_values": NUMBERS}, nominal={"keep_share": 0.5}, simulated=("quant/fake",)
    )
    assert value("cache_achieved_ratio", weights) == 2


def test_slack_and_metadata_count_as_held():
    one = record(held={"codes": NUMBERS // 2, "index": NUMBERS // 4, "slack": NUMBERS // 4})
    assert value("cache_achieved_ratio", one) == 2


def test_what_is_read_is_told_with_the_copy():
    one = record(moved={"linear": 5, "cache": 300, "cache_copy": 1200})
    assert value("cache_bytes_read_per_token", one) == 1500
    assert reading("cache_bytes_read_per_token", record()).kind == "unavailable"


def test_the_peak_of_the_cache_may_be_that_of_the_prompt():
    def phase(size):
        part = Measured(value=size, unit=Unit.BYTE, source="storage bytes")
        return Phase(peaks={}, parts={"cache": part})

    one = record(phases={"prefill": phase(900.0), "decode": phase(300.0)})
    assert value("cache_peak_bytes", one) == 900
    assert reading("cache_peak_bytes", record()).kind == "unavailable"


def test_an_older_record_says_that_it_does_not_know():
    old = record(dense=False, nominal={"bits": 4})
    for name in ("cache_achieved_ratio", "cache_effective_bits"):
        assert "does not tell" in reading(name, old).reason
    # And is written as it was read: the field is not there.
    assert "dense_cache" not in store.dumps(old)
    assert Record.model_validate_json(old.model_dump_json()) == old
    new = record(nominal={"bits": 4})
    assert '"dense_cache"' in store.dumps(new)
    assert Record.model_validate_json(new.model_dump_json()) == new


# End to end


def measured(system, *, prompt=40, new=6):
    """The record of a memory pass of `system`."""
    generator = torch.Generator().manual_seed(0)
    bench = passes.Bench(
        system=system,
        prompts=torch.randint(1, 300, (1, prompt), generator=generator).tolist(),
        workload=WorkloadSpec(prompt_tokens=prompt, new_tokens=new, batch_sizes=(1,)),
        protocol=ProtocolSpec(),
        sampling=SamplingSpec(),
        seed=0,
    )
    memory = memory_pass(bench, phases={}, parameters=1)
    one = record(nominal=dict(system.facts.get("cache_nominal", {})), dtype="float32")
    block = one.blocks[0].model_copy(update={"passes": Passes(memory=memory)})
    return one.model_copy(update={"blocks": (block,)}), memory


def test_the_memory_pass_finds_the_baseline_itself(lab):
    from compresskit.methods.kv.dynamic import DynamicKV
    from compresskit.methods.kv.sink_window import SinkWindow

    plain = lab.system("llama")
    dense, memory = measured(DynamicKV().apply(plain, None))
    assert memory.dense_cache == {"bytes": sum(memory.cache_bytes.values()), "numbers": 45 * 64}
    assert value("cache_achieved_ratio", dense) == 1
    few, _ = measured(SinkWindow(sink=1, window=8).apply(plain, None))
    assert value("cache_achieved_ratio", few) == value("cache_nominal_ratio", few) == 5


def test_sliding_layers_count_with_their_window(lab):
    from compresskit.methods.kv.sink_window import SinkWindow

    one, memory = measured(SinkWindow(sink=1, window=8).apply(lab.system("gemma3_text"), None))
    row = 2 * 2 * 8 * 4
    assert memory.dense_cache["bytes"] == row * (45 + 2 * 15)
    # Two layers of three stay as they are, so asking for a fifth reaches far less.
    assert value("cache_nominal_ratio", one) == 5
    assert 1 < value("cache_achieved_ratio", one) < 2.1


def test_a_whole_copy_is_in_what_a_step_moves(lab):
    from compresskit.methods.kv.hf_fp8 import HFFp8

    one, memory = measured(HFFp8().apply(lab.system("llama"), None))
    assert memory.moved_bytes["cache_copy"] == memory.dense_cache["bytes"]
    held = sum(memory.cache_bytes.values())
    assert value("cache_bytes_read_per_token", one) == held + memory.dense_cache["bytes"]
    assert value("cache_achieved_ratio", one) == pytest.approx(4, rel=0.01)


def test_without_a_cache_there_is_no_ratio(lab):
    one, memory = measured(NoCache().apply(lab.system("llama"), None))
    assert memory.dense_cache is None
    assert reading("cache_achieved_ratio", one).reason == "no keys and values are cached"
    assert memory.cache_bytes == {"ids": 45 * 8}


def test_slack_is_neither_read_nor_forgotten(lab):
    model = lab.system("llama").model
    moved = moved_bytes(model, {"codes": 70, "slack": 5, "copy": 280}, batch=1)
    assert (moved["cache"], moved["cache_copy"]) == (70, 280)


# What people see


def shown(*records):
    built = table.build(join.of(records))
    (group,) = built.groups
    return built, group, {row.label: row for row in group.rows}


def test_the_table_shows_asked_and_held_beside_the_reference():
    one = record(held={"codes": NUMBERS // 4, "scales": NUMBERS // 8}, nominal={"bits": 2})
    built, group, rows = shown(one, record(stack=False))
    assert {"cache_nominal_ratio", "cache_achieved_ratio"} <= group.shown
    cells = rows["kv/dynamic"].cells
    assert text(cells["cache_nominal_ratio"], "ratio") == "8.00"
    assert text(cells["cache_achieved_ratio"], "ratio") == "5.33"
    assert text(rows["dense"].cells["cache_achieved_ratio"], "ratio") == "–"
    assert any("cache ÷ held" in line for line in legend.lines(built))


def test_a_table_without_cache_methods_stays_as_it_was():
    built, group, _ = shown(record(stack=False))
    assert not {"cache_nominal_ratio", "cache_achieved_ratio"} & group.shown
    assert not any("cache ÷" in line for line in legend.lines(built))


def printed(one):
    out = io.StringIO()
    reports.render([one], Console(file=out, width=100, force_terminal=False))
    return out.getvalue()


def test_the_memory_report_tells_the_sizes_apart():
    one = record(
        held={"codes": NUMBERS // 4, "scales": NUMBERS // 8},
        nominal={"bits": 2},
        moved={"cache": 3072},
    )
    said = printed(one)
    assert "cache, asked for: the model's own / 8.00" in said
    assert "cache, held: the model's own / 5.33" in said
    assert "cache, bits per number: 3.00" in said
    assert "cache, touched by one decode step: 3.07 kB a row" in said
    assert "cache, at its peak: n/a" in said
    (found,) = reports.document([one])["records"]
    assert found["cache_nominal"] == {"bits": 2}
    assert found["cache_achieved_ratio"]["value"] == pytest.approx(16 / 3)
    json.dumps(found, allow_nan=False)
    assert "cache, asked" not in printed(record(stack=False))
