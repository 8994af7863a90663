"""kv/int8 and kv/fp8: the error bound, the bytes, and results that do not depend on how tokens are cut."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compresskit_kernels.kv_decode import Rows, quantise
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig

from compresskit.decode import pad
from compresskit.errors import SpecError
from compresskit.hf import attention
from compresskit.hf.cache import Layer, build_cache, cache_bytes, enable_rollback, roll_back
from compresskit.methods.kv._coded import CodedLayer, PerTokenLayer
from compresskit.methods.kv.fp8 import Fp8Cache
from compresskit.methods.kv.int8 import Int8Cache, Int8Layer
from compresskit.methods.speculative.ngram import NGram
from compresskit.traits import Trait

OURS = SimpleNamespace(_attn_implementation=attention.NAME)
METHODS = {"int8": Int8Cache, "fp8": Fp8Cache}


def compressed(system, kind="int8"):
    return METHODS[kind]().apply(system, None)


def with_layers(system, make_layer):
    attention.use(system.model)
    config = system.model.config
    return replace(
        system, new_cache=lambda n: build_cache(config, lambda index: make_layer(config))
    )


def continuation(system, tokens, *, cuts):
    """Logits of all tokens, fed in passes that end at `cuts`."""
    cache, logits, start = system.new_cache(tokens.shape[-1]), [], 0
    with torch.inference_mode():
        for end in (*cuts, tokens.shape[-1]):
            logits.append(system.step(tokens[:, start:end], cache, keep=0))
            start = end
    return torch.cat(logits, dim=1)


def divergence(p, q):
    """Mean KL(p || q) over positions, in nats per token."""
    return (
        torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
        )
        .sum(-1)
        .mean()
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
    outlier=st.sampled_from([1.0, 100.0]),
)
def test_the_error_is_at_most_half_a_scale(seed, magnitude, outlier):
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed)) * magnitude
    x[..., 0] *= outlier
    layer = Int8Layer(OURS)
    layer.update(x, -x)
    # One part in 1e5 for rounding in x / scale and codes * scale.
    assert ((layer.read_keys() - x).abs() <= layer.key_scales.float() * 0.50001).all()
    assert ((layer.read_values() + x).abs() <= layer.value_scales.float() * 0.50001).all()
    assert layer.keys.dtype == torch.int8
    largest = layer.keys.abs().amax(-1)
    # A scale of 16 bits may be rounded up, by less than half a code.
    assert ((largest >= 126) & (largest <= 127) if magnitude else largest == 0).all()


def test_the_error_of_fp8_is_a_share_of_the_number():
    x = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    x[..., 0] *= 100
    fine, coarse = PerTokenLayer(OURS, "fp8"), Int8Layer(OURS)
    for layer in (fine, coarse):
        layer.update(x, x)
    tiny = fine.key_scales.float() * 2**-10
    assert ((fine.read_keys() - x).abs() <= torch.maximum(x.abs() * 2**-4, tiny) * 1.0001).all()
    small = slice(1, None)
    error = [(layer.read_keys() - x)[..., small].square().mean() for layer in (fine, coarse)]
    assert error[0] < error[1] / 10, "what fp8 is for: an outlier spoils int8's other numbers"


def test_quantising_what_was_dequantised_changes_nothing():
    x = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    once = quantise(x, "int8")
    again = quantise(once.dequantise(), "int8")
    assert torch.equal(again.codes, once.codes)
    assert torch.allclose(again.scales, once.scales, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_long_pass_gets_the_type_of_the_model(dtype):
    layer = Int8Layer(OURS)
    keys = torch.randn(1, 2, 4, 8).to(dtype)
    layer.update(keys, keys)
    assert layer.read_keys().dtype == layer.read_values().dtype == dtype
    assert layer.key_scales.dtype == torch.bfloat16


def test_bytes_per_token_of_a_135m_model_match_the_reference_figure():
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = LlamaConfig(hidden_size=576, num_hidden_layers=30, **heads)
    cache = build_cache(config, lambda index: Int8Layer(OURS))
    for rows in (5, 1, 1):
        for index in range(30):
            cache.update(torch.ones(1, 3, rows, 64), torch.ones(1, 3, rows, 64), index)
    # 2 sides * 30 layers * 3 heads, each 64 codes and one scale of 2 bytes.
    assert cache_bytes(cache) == {"codes": 11_520 * 7, "scales": 360 * 7}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("cuts", [(30,), (1, 2, 3), (29, *range(30, 40))])
def test_results_do_not_depend_on_how_tokens_are_cut_into_passes(lab, architecture, cuts, kind):
    # In float64 the order of a sum cannot move a value across a rounding boundary of the codes.
    system = compressed(lab.system(architecture, double=True), kind)
    tokens = lab.prompt(40)
    whole = continuation(system, tokens, cuts=())
    assert (continuation(system, tokens, cuts=cuts) - whole).abs().max() < 1e-6


def test_full_precision_for_the_newest_tokens_would_depend_on_the_cuts(lab):
    """Negative control: the usual layer, which quantises only behind the current pass."""

    class Late(Int8Layer):
        def over_rows(self, call):
            rows, new = super().over_rows(call), call.query.shape[2]
            rows.keys[..., -new:, :], rows.values[..., -new:, :] = call.keys, call.values
            return rows

    system = with_layers(lab.system("llama", double=True), Late)
    tokens = lab.prompt(40)
    moved = continuation(system, tokens, cuts=range(1, 40)) - continuation(system, tokens, cuts=())
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("kind", METHODS)
def test_one_pass_over_a_window_shows_the_error(lab, kind):
    system = lab.system("llama")
    tokens = lab.prompt(40)
    dense = continuation(system, tokens, cuts=())
    assert 0 < divergence(dense, continuation(compressed(system, kind), tokens, cuts=())) < 0.03


def test_three_levels_instead_of_255_are_noticed(lab):
    """Negative control: if this coarse cache looked harmless, the measurement would be blind."""

    class Coarse(Int8Layer):
        store = CodedLayer.store

        def encode_keys(self, keys):
            scales = keys.abs().amax(-1, keepdim=True)
            return Rows("int8", (keys / scales).round().to(torch.int8), scales)

        encode_values = encode_keys

    system = lab.system("llama")
    tokens = lab.prompt(40)
    dense = continuation(system, tokens, cuts=())
    fine = divergence(dense, continuation(compressed(system), tokens, cuts=()))
    coarse = continuation(with_layers(system, Coarse), tokens, cuts=())
    assert divergence(dense, coarse) > 100 * fine


def test_a_left_padded_batch_equals_its_rows_alone(lab, architecture):
    system = compressed(lab.system(architecture))
    prompts = [lab.prompt(length, seed=length)[0].tolist() for length in (3, 25, 11)]
    tokens, mask = pad(prompts, device=torch.device("cpu"))
    together = lab.rows(system.generate(lab.request(tokens, 16, mask=mask)))
    alone = [lab.rows(system.generate(lab.request(torch.tensor([p]), 16)))[0] for p in prompts]
    assert together == alone


@pytest.mark.parametrize("length", [6, 30])
def test_a_rollback_leaves_no_trace(lab, architecture, length):
    system = compressed(lab.system(architecture))
    tokens, rejected = lab.prompt(length), lab.prompt(5, seed=8)
    with torch.inference_mode():
        cache, fresh = system.new_cache(64), system.new_cache(64)
        system.step(tokens, cache)
        enable_rollback(cache)
        system.step(rejected, cache)
        roll_back(cache, 5)
        system.step(tokens, fresh)
        assert torch.equal(system.step(rejected[:, :2], cache), system.step(rejected[:, :2], fresh))


def test_speculation_over_int8_equals_int8_alone(lab, architecture):
    system = compressed(lab.system(architecture, double=True))
    tokens = lab.prompt(6).repeat(1, 4)
    speculative = NGram().apply(system, None)
    request = lab.request(tokens, 40)
    assert lab.rows(speculative.generate(request)) == lab.rows(system.generate(request))


def test_codes_and_scales_move_together():
    layer = Int8Layer(OURS)
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(1))
    layer.update(x, -x)
    before = layer.read_keys()
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 5]))
    layer.crop(-1)
    more = torch.randn(2, 2, 1, 8)
    layer.update(more, more)
    assert torch.equal(layer.read_keys()[:, :, :3], before[[2, 1]][:, :, :3])
    assert torch.equal(layer.read_values()[:, :, :3], -before[[2, 1]][:, :, :3])
    assert {getattr(layer, name).shape[:3] for name in layer.tensors} == {(2, 2, 4)}
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(x, x)
    assert torch.equal(layer.read_keys(), before)


def test_beam_search_runs_on_it(lab):
    system = compressed(lab.system("llama"))
    tokens = lab.prompt(12)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    out = system.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=system.new_cache(0),
        **options,
    )
    assert out.shape == (1, 20)


def test_what_it_leaves_behind():
    before = frozenset(Trait)
    after = Int8Cache().effects().after(before)
    assert before - after == {Trait.DENSE_CACHE, Trait.STATIC_SHAPES, Trait.LOSSLESS}


def test_only_full_attention_layers_are_quantised(lab):
    cache = compressed(lab.system("gemma3_text")).new_cache(0)
    assert [isinstance(layer, Layer) for layer in cache.layers] == [False, True, False]


def test_it_has_no_parameters():
    with pytest.raises(SpecError, match="bits"):
        Int8Cache.decode({"bits": 4}, where="kv/int8")
