"""quant/gptq, quant/awq and quant/smoothquant on tiny models: text, facts, fallbacks, errors."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from compresskit import text as texts
from compresskit.assets import text_path
from compresskit.device import resolve
from compresskit.errors import InputError, RunError, SpecError
from compresskit.hf import modules, tiny
from compresskit.method import Context
from compresskit.methods.quant._packed import PackedLinear
from compresskit.methods.quant.awq import AWQ
from compresskit.methods.quant.gptq import GPTQ
from compresskit.methods.quant.hqq import HQQ
from compresskit.methods.quant.intn import IntN
from compresskit.methods.quant.smoothquant import SmoothQuant
from compresskit.system import System

SMALL = {"samples": 6, "length": 40}
CALIBRATED = [
    GPTQ(group=32, **SMALL),
    GPTQ(group=32, act_order=True, symmetric=True, activations="int8", **SMALL),
    AWQ(group=32, points=4, **SMALL),
    SmoothQuant(**SMALL),
]
WORDS = torch.randint(3, 500, (4000,), generator=torch.Generator().manual_seed(0)).tolist()


def system(model, **facts):
    """The tokenizer adds a BOS token, 1."""
    tokenizer = SimpleNamespace(
        bos_id=1, encode=lambda text, special: [*([1] if special else []), 97]
    )
    rest = dict.fromkeys(("step", "new_cache", "decode"))
    return System(
        model=model, device=resolve("cpu"), context=64, tokenizer=tokenizer, facts=facts, **rest
    )


def context(progress=lambda label, done, total: None):
    return Context(
        load=None,
        calibration=lambda text, count: WORDS[:count],
        seed=0,
        dtype="",
        progress=progress,
    )


def apply(method, model, **options):
    return method.apply(system(model), context(**options))


@torch.no_grad()
def logits(model):
    return model(torch.tensor([WORDS[-40:]]), use_cache=False).logits.double()


@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_is_quantised_and_stays_itself(architecture, method):
    """At 8 bits what is left of the error is small; a wrong fold or permutation would not be.

    The median over tokens, since a router may send a few of them to other experts.
    """
    model = tiny.random_model(architecture, dtype=torch.bfloat16)
    precise = method if isinstance(method, SmoothQuant) else method.model_copy(update={"bits": 8})
    want = logits(model)
    done = apply(precise, model)
    got = logits(done.model)
    assert not modules.linears(done.model)
    off = (got - want).norm(dim=2) / want.norm(dim=2)
    assert 0 < float(off.median()) < 0.1
    json.dumps(dict(done.facts), allow_nan=False)


@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_the_objective_is_better_than_rounding(method, open_stack):
    """On the calibration text, with the trained tiny model."""
    with open_stack() as opened:
        real = Context(
            load=None,
            calibration=lambda text, count: opened.system.tokenizer.encode(
                texts.load(text).content, special=False
            )[:count],
            seed=0,
            dtype="",
        )
        more = method.model_copy(update={"samples": 8, "length": 64})
        facts = more.apply(opened.system, real).facts
    limit = 0.97 if isinstance(method, SmoothQuant) else 0.9
    assert 0.1 < facts["objective_relative_to_rtn"] < limit
    assert facts["rounded_to_nearest"] == {}


def test_the_record_says_what_was_calibrated_on():
    facts = apply(GPTQ(group=32, **SMALL), tiny.random_model("llama")).facts
    shipped = text_path("calibration").read_text(encoding="utf-8")
    rows = [[1, *WORDS[start : start + 39]] for start in range(0, 6 * 39, 39)]
    assert facts["calibration"] == {
        "text": "calibration",
        "text_sha256": texts.Text("", shipped).sha256,
        "samples": 6,
        "length": 40,
        "tokens": 240,
        "tokens_sha256": texts.ids_sha256(rows),
    }


@pytest.mark.parametrize("as_file", [False, True])
def test_the_evaluation_text_is_refused(as_file):
    source = str(text_path("heldout")) if as_file else "embedded"
    with pytest.raises(SpecError, match="text that quality is measured on"):
        apply(GPTQ(text=source, **SMALL), tiny.random_model("llama"))


def test_a_short_text_is_a_clear_error(open_stack, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too few words to learn from.\n")
    with (
        pytest.raises(InputError, match=r"short\.txt' has \d+ tokens; \d+ are wanted"),
        open_stack(f"quant/awq:text={short}"),
    ):
        pass


def test_rows_longer_than_the_context_are_refused():
    with pytest.raises(SpecError, match="length: 65 tokens a row are more than the 64"):
        apply(AWQ(length=65), tiny.random_model("llama"))


@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_weights_that_are_not_numbers_are_named(method):
    model = tiny.random_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN"):
        apply(method, model)


def test_activations_that_are_not_numbers_are_named():
    model = tiny.random_model("llama")
    model.model.layers[0].input_layernorm.weight.data[:] = float("inf")
    with pytest.raises(RunError, match=r"inputs of model\.layers\.0\.self_attn\.q_proj are not"):
        apply(GPTQ(**SMALL), model)


def test_what_cannot_be_folded_is_applied_at_run_time():
    """GPT-2's last layer of a block reads a nonlinearity."""
    model = tiny.random_model("gpt2", dtype=torch.bfloat16)
    done = apply(SmoothQuant(alpha=0.8, **SMALL), model)
    scales = [m.input_scale for m in model.modules() if isinstance(m, PackedLinear)]
    scales = [scale for scale in scales if scale is not None]
    assert 0 < len(scales) <= done.facts["scales_folded_into"]["run time"]
    assert {scale.dtype for scale in scales} == {torch.bfloat16}


def test_a_bias_is_divided_with_its_rows():
    """Values without grouped heads take the scale of the output projection, biases included."""
    model = tiny.random_model("qwen2", num_key_value_heads=4)
    values = [layer.self_attn.v_proj.bias.detach().clone() for layer in model.model.layers]
    want = logits(model)
    done = apply(SmoothQuant(alpha=0.3, **SMALL), model)
    right = float((logits(model) - want).norm())
    assert done.facts["scales_folded_into"]["linear"] > 0
    changed = 0
    for layer, bias in zip(model.model.layers, values, strict=True):
        changed += not torch.equal(layer.self_attn.v_proj.bias, bias)
        layer.self_attn.v_proj.bias = bias
    assert changed
    assert float((logits(model) - want).norm()) > right


def test_too_few_tokens_fall_back_to_rounding_and_say_so():
    """100 tokens determine layers of 64 inputs, not those of 128."""
    model, twin = tiny.random_model("llama"), tiny.random_model("llama")
    done = apply(GPTQ(samples=5, length=20), model)
    downs = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert done.facts["rounded_to_nearest"] == dict.fromkeys(downs, "100 tokens for 128 inputs")
    apply(IntN(bits=4), twin)
    for name in ("mlp.down_proj", "mlp.up_proj"):
        one = model.model.layers[0].get_submodule(name).product.tensors()["packed"]
        other = twin.model.layers[0].get_submodule(name).product.tensors()["packed"]
        assert torch.equal(one, other) == (name == "mlp.down_proj")


@pytest.mark.parametrize("method", [GPTQ(**SMALL), AWQ(points=2, **SMALL), SmoothQuant(**SMALL)])
def test_layers_that_the_text_does_not_reach_are_rounded_and_named(method):
    model = tiny.random_model("llama")
    model.model.layers[0].mlp.unused = torch.nn.Linear(64, 32)
    model.model.aside = torch.nn.Linear(64, 32)
    done = apply(method, model)
    assert done.facts["rounded_to_nearest"] == {
        "model.layers.0.mlp.unused": "never called",
        "model.aside": "outside the blocks",
    }
    assert not modules.linears(model)


def test_experts_in_one_parameter_are_rounded_and_said_to_be():
    done = apply(GPTQ(group=32, **SMALL), tiny.random_model("mixtral"))
    assert done.facts["rounded_to_nearest"] == {"experts": "3-D parameters"}
    assert "experts" not in done.facts["left_dense"]


@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_a_tied_embedding_shares_the_packed_weight_of_the_head(method):
    model = tiny.random_model("llama")
    table = model.get_input_embeddings().weight.detach().clone()
    done = apply(method.model_copy(update={"embeddings": True}), model)
    assert model.get_input_embeddings().product is model.lm_head.product
    assert "embedding" not in done.facts["left_dense"]
    # Rows are looked up as they are: nothing may have been scaled for the head.
    assert model.lm_head.input_scale is None
    got = model.get_input_embeddings()(torch.arange(500))
    assert float((got - table[:500]).norm() / table[:500].norm()) < 0.25


def test_skip_and_head_leave_layers_dense():
    model = tiny.random_model("llama")
    apply(AWQ(skip=("*.up_proj",), head=False, points=4, **SMALL), model)
    left = [site.name for site in modules.linears(model)]
    assert left == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]


def test_progress_counts_blocks_and_the_head():
    told = []
    apply(
        GPTQ(group=32, **SMALL),
        tiny.random_model("llama"),
        progress=lambda label, done, total: told.append((label, done, total)),
    )
    assert told == [("gptq", 1, 3), ("gptq", 2, 3), ("gptq", 3, 3)]


def test_gptq_sends_later_blocks_what_quantised_ones_put_out():
    """Two bits upset block 0 so much that block 1 is solved for other inputs than the dense ones."""
    one, other = tiny.random_model("llama"), tiny.random_model("llama")
    apply(GPTQ(bits=2, group=32, **SMALL), one)
    skipped = GPTQ(bits=2, group=32, skip=("*.layers.0.*",), **SMALL)
    apply(skipped, other)
    codes = [m.model.layers[1].self_attn.q_proj.product.tensors()["packed"] for m in (one, other)]
    assert not torch.equal(*codes)


def test_hqq_is_closer_in_its_norm_and_packs_like_the_others():
    model = tiny.random_model("llama")
    done = HQQ(bits=3, group=32).apply(system(model), context())
    assert all(isinstance(m, PackedLinear) for n, m in model.named_modules() if n.endswith("_proj"))
    assert done.facts["quantized_parameters"] > 0


def test_memory_for_activations_is_bounded(monkeypatch):
    """Many rows pass a block a few at a time, and nothing depends on how many."""
    from compresskit.methods.quant import _calibrate

    whole = apply(GPTQ(group=32, **SMALL), tiny.random_model("llama")).facts
    monkeypatch.setattr(_calibrate, "TOKENS", 80)
    split = apply(GPTQ(group=32, **SMALL), tiny.random_model("llama")).facts
    assert split["objective_relative_to_rtn"] == pytest.approx(
        whole["objective_relative_to_rtn"], rel=1e-2
    )
