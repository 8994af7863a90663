"""The prepacked dense baseline: bit-equal to the plain layer, honest about its bytes."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from compresskit.errors import Conflict
from compresskit.hf import modules
from compresskit.hf.prepack import PrepackedLinear, prepack


def can_prepack():
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


needs_bf16 = pytest.mark.skipif(not can_prepack(), reason="this CPU has no bfloat16 for oneDNN")


def llama(*, tied=True, dtype=torch.bfloat16):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 200}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).to(dtype).eval()


@needs_bf16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 64), (5, 100, 70), (33, 41, 401), (0, 8, 16)], ids=str)
def test_bit_equal_to_the_plain_layer(shape, bias):
    m, n, k = shape
    torch.manual_seed(0)
    layer = nn.Linear(k, n, bias=bias).bfloat16()
    packed = PrepackedLinear(layer.weight.detach(), layer.bias.detach() if bias else None)
    for x in (torch.randn(m, k), torch.randn(2, m, k), torch.randn(2, k, m).transpose(1, 2)):
        x = x.bfloat16()
        with torch.inference_mode():
            want = functional.linear(x.contiguous(), layer.weight, layer.bias)
            assert torch.equal(packed(x), want)


@needs_bf16
@pytest.mark.parametrize("tied", [True, False])
def test_a_prepacked_model_gives_the_same_bits(tied):
    model = llama(tied=tied)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.inference_mode():
        want = model(tokens, use_cache=False).logits
        names = prepack(model)
        got = model(tokens, use_cache=False).logits
    assert torch.equal(got, want)
    assert len(names) == 2 * 7 + 1
    assert "lm_head" in names
    assert not modules.linears(model)


@needs_bf16
def test_bytes_are_those_of_the_laid_out_weight():
    layer = PrepackedLinear(torch.zeros(128, 64, dtype=torch.bfloat16), None)
    assert layer.held_bytes() == {"packed": 128 * 64 * 2}
    odd = PrepackedLinear(torch.zeros(100, 70, dtype=torch.bfloat16), torch.zeros(100))
    assert odd.held_bytes()["packed"] >= 100 * 70 * 2
    assert odd.held_bytes()["bias"] == 400


@needs_bf16
@pytest.mark.parametrize(("tied", "copies"), [(True, 1), (False, 0)])
def test_a_tied_head_costs_a_copy(tied, copies):
    model = llama(tied=tied)
    before = modules.weight_bytes(model)
    prepack(model)
    head = sum(model.lm_head.held_bytes().values())
    padding = sum(
        module.held_bytes()["packed"] - module.in_features * module.out_features * 2
        for module in model.modules()
        if isinstance(module, PrepackedLinear) and module is not model.lm_head
    )
    plain = 200 * 64 * 2
    assert modules.weight_bytes(model) == before + padding + (head if copies else head - plain)


@needs_bf16
def test_gpt2_with_its_transposed_layers():
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 200, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).bfloat16().eval()
    tokens = torch.arange(12).reshape(1, 12)
    with torch.inference_mode():
        want = model(tokens, use_cache=False).logits
        prepack(model)
        got = model(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_float32_is_refused_before_anything_is_touched():
    model = llama(dtype=torch.float32)
    with pytest.raises(Conflict, match=r"needs bfloat16 weights; .*q_proj is float32"):
        prepack(model)
    assert len(modules.linears(model)) == 15


def test_a_machine_that_cannot_is_told_why(monkeypatch):
    def refuse(*_):
        raise RuntimeError("bf16 path needs the cpu support avx512bw\nand a stack")

    monkeypatch.setattr("compresskit.hf.prepack.PrepackedLinear", refuse)
    model = llama()
    with pytest.raises(Conflict, match=r"cannot run here: bf16 path .* avx512bw\. Use mode"):
        prepack(model)
    assert len(modules.linears(model)) == 15


def test_each_layer_is_dropped_before_the_next_is_made():
    """Otherwise the peak would be the dense model and the packed one together."""
    model = llama(tied=False)
    originals = [weakref.ref(site.module) for site in modules.linears(model)]
    alive = []

    def make(site):
        alive.append(sum(original() is not None for original in originals))
        return nn.Identity()

    modules.replace_each(modules.linears(model), make)
    assert alive == list(range(15, 0, -1))
    assert not any(original() for original in originals)
