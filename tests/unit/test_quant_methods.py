"""quant/int8 and quant/int4 on tiny random models: numbers, bytes, and what they say of it."""

import copy

import pytest
import torch
from compresskit_kernels import dispatch, host
from compresskit_kernels.native import build
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from compresskit.device import resolve
from compresskit.errors import Conflict, RunError, SpecError
from compresskit.hf import modules
from compresskit.method import Context
from compresskit.methods.quant import _linear, int4, int8
from compresskit.methods.quant._group import quantise
from compresskit.methods.quant.int4 import Int4
from compresskit.methods.quant.int8 import Int8
from compresskit.methods.quant.intn import IntN
from compresskit.system import System
from compresskit.traits import Trait

SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
METHODS = [
    Int8(),
    Int4(),
    Int4(group=32, symmetric=True),
    Int4(group=128, zero_point="integer"),
    IntN(bits=3, group=0),
    IntN(bits=6),
]
needs_fast = pytest.mark.skipif(host.int4_block() is None, reason="no packed product on this CPU")


def llama(*, tied=True, dtype=torch.bfloat16):
    torch.manual_seed(0)
    options = {"intermediate_size": 144, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options)).to(dtype).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 96, "n_layer": 2, "n_head": 4, "vocab_size": 200, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def mixtral():
    torch.manual_seed(0)
    options = {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **options)).eval()


def apply(method, model, **facts):
    nothing = dict.fromkeys(("tokenizer", "step", "new_cache", "decode"))
    system = System(model=model, device=resolve("cpu"), context=64, facts=facts, **nothing)
    context = Context(load=None, calibration=None, seed=0, dtype="float32")
    return method.apply(system, context)


@torch.inference_mode()
def logits(model, length=12):
    tokens = torch.arange(length).remainder(200).reshape(1, length)
    return model(tokens, use_cache=False).logits.double()


def rounding(method, weight):
    if isinstance(method, Int8):
        return int8.quantise(weight.float()).dequantise()
    bits = getattr(method, "bits", 4)
    options = {"group": method.group, "symmetric": method.symmetric}
    return quantise(weight.float(), bits=bits, zero_point=method.zero_point, **options).dequantise()


def rounded_twin(model, method):
    """The dense model with every linear weight rounded, as the packed one should compute it."""
    twin = copy.deepcopy(model)
    top = modules.head(twin)
    if modules.is_tied(twin):  # the head is rounded, the embedding is not
        top.weight = torch.nn.Parameter(top.weight.detach().clone())
    for site in modules.linears(twin):
        site.weight().copy_(rounding(method, site.weight()))
    for site in modules.experts(twin):
        for stacked in (site.module.gate_up_proj, site.module.down_proj):
            for expert in stacked.detach():
                expert.copy_(rounding(method, expert))
    return twin


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(
    "make",
    [llama, lambda: llama(tied=False), lambda: llama(dtype=torch.float32), gpt2, mixtral],
    ids=["tied", "untied", "float32", "gpt2", "mixtral"],
)
def test_the_packed_model_computes_what_the_rounded_one_does(make, method):
    model = make()
    twin = rounded_twin(model.float() if method is None else model, method)
    want, dense = logits(twin.float()), logits(model)
    system = apply(method, model)
    got = logits(system.model)
    assert (got - want).norm() / want.norm() < 0.03
    assert not torch.equal(got, dense)


@needs_fast
def test_many_rows_and_one_row_agree():
    model = apply(Int4(), llama(dtype=torch.float32)).model
    long, short = logits(model, 90), logits(model, 60)
    torch.testing.assert_close(long[:, :60], short, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_bytes_shrink_and_are_all_accounted_for(method):
    model = llama(tied=False)
    before = modules.weight_bytes(model)
    parameters = modules.parameter_count(model)
    assert before == 2 * parameters
    system = apply(method, model)
    packed = [m for m in model.modules() if isinstance(m, _linear.PackedLinear)]
    held = sum(t.nbytes for m in packed for t in m.product.tensors().values())
    left = sum(p.nbytes for p in model.parameters())
    assert not modules.linears(model)
    assert held + left == modules.weight_bytes(model) < before * 0.75
    assert system.facts["effective_bits_per_parameter"] == 8 * (held + left) / parameters
    assert sum(system.facts["left_dense"].values()) == left


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_left_dense_is_named(tied):
    model = llama(tied=tied)
    facts = apply(Int8(head=False), model).facts
    embedding, norms = 200 * 96 * 2, 5 * 96 * 2
    expected = {"embedding": embedding, "norm": norms}
    assert facts["left_dense"] == (expected if tied else {**expected, "head": embedding})
    layers = 2 * (96 * 96 * 2 + 96 * 48 * 2 + 3 * 96 * 144)
    assert facts["quantized_parameters"] == layers


def test_a_tied_head_gets_its_own_copy_and_the_embedding_stays():
    model = llama()
    table = model.get_input_embeddings().weight.detach().clone()
    facts = apply(Int8(), model).facts
    assert isinstance(model.lm_head, _linear.PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert facts["left_dense"]["embedding"] == 200 * 96 * 2
    # 8 bits, plus the dense embedding that is now held beside the head.
    assert facts["effective_bits_per_parameter"] > 8 + 16 * 200 * 96 / modules.parameter_count(
        llama()
    )


def test_experts_in_one_parameter_are_packed_too():
    model = mixtral()
    facts = apply(Int4(), model).facts
    assert "experts" not in facts["left_dense"]
    assert facts["left_dense"]["router"] == 2 * 4 * 96 * 4
    experts = 2 * 4 * 3 * 96 * 64
    attention = 2 * (2 * 96 * 96 + 2 * 96 * 48)
    assert facts["quantized_parameters"] == experts + attention + 200 * 96


def test_experts_that_are_skipped_are_said_to_be_dense():
    facts = apply(Int4(skip=("*.experts",)), mixtral()).facts
    assert facts["left_dense"]["experts"] == 2 * 4 * (3 * 96 * 64) * 4


def test_experts_of_every_common_form_are_found():
    """Gate and up interleaved, transposed, with biases: gpt-oss."""
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
    config = GptOssConfig(
        **sizes, head_dim=24, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    )
    model = GptOssForCausalLM(config).eval()
    for parameter in model.parameters():  # transformers leaves the experts uninitialised
        torch.nn.init.normal_(parameter, std=0.05)
    dense = logits(model)
    packed = logits(apply(Int8(), model).model)
    assert 0 < (packed - dense).norm() / dense.norm() < 0.03


@pytest.mark.parametrize("method", [Int8(embeddings=True), Int4(embeddings=True)], ids=repr)
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_embedding_looks_up_rounded_rows(method, tied):
    model = llama(tied=tied, dtype=torch.float32)
    table = model.get_input_embeddings().weight.detach().clone()
    facts = apply(method, model).facts
    embedding = model.get_input_embeddings()
    ids = torch.tensor([[3, 0, 199], [3, 17, 16]])
    torch.testing.assert_close(embedding(ids), rounding(method, table)[ids], rtol=2**-8, atol=1e-6)
    assert "embedding" not in facts["left_dense"]
    held = sum(embedding.held_bytes().values())
    assert (held == 0) == tied, "a tied embedding is the head's weight and is counted there"


def test_a_tied_embedding_cannot_be_packed_without_the_head():
    with pytest.raises(SpecError, match="Set head to true"):
        apply(Int8(embeddings=True, head=False), llama())


def test_gpt2_layers_are_found_and_transposed():
    model = gpt2()
    names = {site.name for site in modules.linears(model)}
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "lm_head"} <= names
    apply(Int8(), model)
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (96, 288)
    assert layer.held_bytes()["bias"] == 288 * 4


def test_skip_leaves_layers_by_pattern():
    model = llama()
    apply(Int4(skip=("*.down_proj", "lm_head")), model)
    left = [site.name for site in modules.linears(model)]
    assert left == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(SpecError, match=r"'\*\.dwon_proj' matches no linear layer.*q_proj"):
        apply(Int4(skip=("*.dwon_proj",)), llama())


def test_nothing_left_to_quantise_is_a_conflict():
    with pytest.raises(Conflict, match="no linear layer left"):
        apply(Int4(skip=("*",)), llama())


def test_weights_that_are_not_numbers_are_refused():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN"):
        apply(Int8(), model)


@pytest.mark.parametrize(("group", "warned"), [(32, True), (64, False)])
def test_a_baseline_on_the_grid_is_noticed(group, warned):
    """What a Q4_1 file leaves: 16 levels per 32 weights, with a float minimum."""
    model = llama(dtype=torch.float32)
    for site in modules.linears(model)[:-1]:  # the head is full-precision, as in such files
        weight = site.weight()
        stored = int4.quantise(weight, group=32, symmetric=False, dtype=torch.float32)
        weight.copy_(stored.dequantise())
    facts = apply(Int4(group=group), model, warnings=["earlier"]).facts
    assert len(facts["warnings"]) == 1 + warned
    if warned:
        assert facts["warnings"][1].startswith("baseline already on this grid: 14 of 15 layers")


@pytest.mark.parametrize(("method", "low", "high"), [(Int8(), 0.003, 0.02), (Int4(), 0.06, 0.12)])
def test_the_weight_error_is_that_of_the_scheme(method, low, high):
    assert low < apply(method, llama()).facts["weight_error"] < high


@needs_fast
def test_the_record_names_the_chosen_and_the_run_implementation(monkeypatch):
    monkeypatch.setattr(build, "available", lambda: False)
    dispatch.reset()
    system = apply(Int4(), llama())
    assert "_weight_int4pack_mm_for_cpu" in system.kernels["grouped_matmul"]
    assert dispatch.used() == {}
    logits(system.model)
    assert dispatch.used() == {"grouped_matmul": ("cpu: _weight_int4pack_mm_for_cpu bf16",)}
    dispatch.reset()


def test_the_fallback_is_named(monkeypatch):
    monkeypatch.setattr(build, "available", lambda: False)
    monkeypatch.setattr(host, "int4_block", lambda: None)
    system = apply(Int4(), llama())
    assert system.kernels == {"grouped_matmul": "reference: dequantise float32"}
    assert logits(system.model).isfinite().all()


def test_packed_layers_stay_out_of_the_state_dict():
    model = llama()
    apply(Int4(), model)
    assert all("proj" not in key for key in model.state_dict())


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_effects(method):
    effects = method.effects()
    assert effects.requires == {Trait.MODULES, Trait.FLOAT_WEIGHTS}
    assert effects.removes == {Trait.FLOAT_WEIGHTS, Trait.LOSSLESS}


def test_parameters_are_checked_where_they_are_written():
    assert Int4.decode({"group": 128, "skip": ["lm_head"]}, where="x").skip == ("lm_head",)
    with pytest.raises(SpecError, match="group"):
        Int4.decode({"group": 48}, where="x")
    assert not (Int4().group == 32 and not Int4().symmetric), "the grid of common 4-bit files"
