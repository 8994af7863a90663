"""The audit of a model: every byte and every parameter in some line, and said if not."""

from __future__ import annotations

import gc
import io
from types import SimpleNamespace

import pytest
import torch
from compresskit_kernels import dispatch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from compresskit import catalogue
from compresskit.device import resolve
from compresskit.errors import Conflict
from compresskit.hf import audit, modules
from compresskit.measure.memory.weights import weight_bytes
from compresskit.method import Stage
from compresskit.methods.quant.int4 import Int4
from compresskit.methods.quant.int8 import Int8
from compresskit.methods.quant.intn import IntN
from compresskit.report import audit as report
from compresskit.spec import MethodSpec
from compresskit.system import System

SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 200}
# Counted by hand: q, o; k, v; gate, up, down; two norms.
BLOCK = 2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 144 + 2 * 96
TIED = 3 * BLOCK + 200 * 96 + 96


def llama(*, tied=True):
    torch.manual_seed(0)
    options = {"intermediate_size": 144, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options)).to(torch.bfloat16).eval()


def mixtral():
    torch.manual_seed(0)
    options = {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **options)).eval()


def system(model, **facts):
    nothing = dict.fromkeys(("tokenizer", "step", "new_cache", "decode"))
    return System(model=model, device=resolve("cpu"), context=64, facts=facts, **nothing)


def facts_of(model, method=None, **facts):
    tied, loaded = modules.is_tied(model), modules.parameter_count(model)
    context = SimpleNamespace(progress=lambda label, done, total: None)
    before = system(model, **facts)
    after = before if method is None else method.apply(before, context)
    return audit.added(after, tied=tied, parameters=loaded)


def line_of(facts, name):
    return [line for line in facts["audit"] if line["modules"] == name]


def sums(lines):
    own = [line for line in lines if "note" not in line]
    return sum(line["bytes"] for line in lines), sum(line["parameters"] for line in own)


WEIGHTS = [name for name in catalogue.method_names() if catalogue.get(name).stage is Stage.WEIGHTS]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "tiny") for name in (None, *WEIGHTS)),
        *((name, "tiny:moe") for name in (None, "quant/int4", "quant/mixed")),
    ],
)
def test_every_method_leaves_an_audit_that_adds_up(name, model, open_stack):
    """Bytes are those of the memory pass, parameters those of the model's checkpoint."""
    parameters = {"tiny": 853_120, "tiny:moe": 559_744}[model]  # counted in the shipped files
    method = [] if name is None else [
        catalogue.normalise(
            MethodSpec(name=name, params=dict(catalogue.get(name).example))
        ).label()
    ]  # fmt: skip
    try:
        with open_stack(*method, model=model) as opened:
            lines = opened.system.facts["audit"]
            held = weight_bytes(opened.system.model)
            warned = opened.system.facts.get("warnings", [])
            used = opened.parameters
    except Conflict as refused:
        pytest.skip(str(refused))
    assert sums(lines) == (sum(held.values()), parameters)
    assert used == parameters
    assert not [one for one in warned if "account for" in str(one)]
    gc.collect()


def test_the_dense_model_is_counted_by_hand():
    facts = facts_of(llama())
    size, count = sums(facts["audit"])
    buffers = sum(line["bytes"] for line in facts["audit"] if line["kind"] == "buffer")
    assert count == TIED
    assert size - buffers == 2 * TIED
    (down,) = line_of(facts, "model.layers.*.mlp.down_proj")
    assert down == {
        "modules": "model.layers.*.mlp.down_proj",
        "count": 3,
        "kind": "linear",
        "parameters": 3 * 96 * 144,
        "bytes": 2 * 3 * 96 * 144,
        "bits": 16.0,
        "storage": "dense bfloat16",
        "implementation": "torch",
    }
    assert "warnings" not in facts


def test_a_tied_head_that_was_packed_is_a_copy_and_counts_once():
    facts = facts_of(llama(), Int8())
    (head,) = line_of(facts, "lm_head")
    assert head["kind"] == "head"
    assert head["note"] == "copy of the embedding"
    assert 8.0 < head["bits"] < 8.5
    assert sums(facts["audit"])[1] == TIED
    everything = sum(line["parameters"] for line in facts["audit"])
    assert everything == TIED + 200 * 96
    untied = facts_of(llama(tied=False), Int8())
    assert "note" not in line_of(untied, "lm_head")[0]
    assert sums(untied["audit"])[1] == TIED + 200 * 96


def test_an_embedding_that_shares_the_packed_head_takes_nothing():
    facts = facts_of(llama(), Int8(embeddings=True))
    (table,) = line_of(facts, "model.embed_tokens")
    assert (table["bytes"], table["parameters"], table["storage"]) == (0, 0, "shared")
    assert sums(facts["audit"])[1] == TIED


def test_layers_of_one_kind_part_where_they_are_stored_differently():
    with dispatch.forced("reference"):  # the portable form, which pads to whole words only
        facts = facts_of(llama(), IntN(bits=4, group=32, layers=("*.1.mlp.down_proj=8",)))
    narrow, wide = sorted(
        line_of(facts, "model.layers.*.mlp.down_proj"), key=lambda line: line["bits"]
    )
    assert (narrow["count"], narrow["blocks"]) == (2, "0, 2")
    assert (wide["count"], wide["blocks"]) == (1, "1")
    # 144 inputs: five groups, the last one ragged, with a scale and an offset of 16 bits each.
    assert narrow["bits"] == pytest.approx(4 + 5 * 32 / 144)
    assert wide["bits"] == pytest.approx(8 + 5 * 32 / 144)
    assert "blocks" not in line_of(facts, "model.layers.*.mlp.up_proj")[0]


def test_experts_are_named_packed_or_dense_and_dense_ones_are_a_warning():
    packed = facts_of(mixtral(), Int4(group=32))
    assert {line["kind"] for line in packed["audit"] if "experts" in line["modules"]} == {"experts"}
    assert "warnings" not in packed
    left = facts_of(mixtral(), Int4(group=32, skip=("*experts",)), warnings=["earlier"])
    (experts,) = line_of(left, "model.layers.*.mlp.experts")
    assert experts["bits"] == 32.0
    assert left["warnings"][0] == "earlier"
    assert "experts stayed dense float32 and takes" in left["warnings"][1]


def test_dense_experts_of_a_dense_model_are_no_warning():
    assert "warnings" not in facts_of(mixtral())


def test_what_is_dropped_is_noticed():
    """Negative control: a module that is gone leaves a hole in the parameters."""
    model = llama()
    loaded = modules.parameter_count(model)
    model.model.layers[1].mlp.up_proj = nn.Identity()
    facts = audit.added(system(model), tied=True, parameters=loaded)
    (warning,) = facts["warnings"]
    assert warning.startswith(f"audit: the modules account for {TIED - 96 * 144} of the {TIED}")


def test_what_hides_outside_the_modules_is_missing_from_the_bytes():
    """Negative control of the sum: it does not hold for a packed layer that understates itself."""
    model = llama()
    facts_of(model, Int8())
    held = sum(weight_bytes(model).values())
    assert sums(audit.rows(model, tied=True))[0] == held
    model.lm_head.held_bytes = lambda: {"codes": 1}
    assert sums(audit.rows(model, tied=True))[0] < held


def printed(record, width=100):
    console = Console(file=io.StringIO(), width=width)
    report.render([record], console)
    return console.file.getvalue()


def test_the_audit_is_printed_for_a_record():
    record = SimpleNamespace(
        facts=facts_of(llama(), Int8()), reason=None, status="ok", label="quant/int8", digest="d",
        spec=SimpleNamespace(
            model=SimpleNamespace(name="m"), engine=SimpleNamespace(mode="eager")
        ),
    )  # fmt: skip
    text = printed(record)
    assert "model.layers.*.mlp.up_proj ×3" in text
    assert f"{TIED:,}" in text
    assert report.document([record])["records"][0]["audit"] == record.facts["audit"]
    record.facts = {}
    assert "no audit" in printed(record)
