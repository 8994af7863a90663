"""kv/int8: the error bound, the bytes, and results that do not depend on how tokens are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig

from compresskit.decode import pad
from compresskit.errors import SpecError
from compresskit.hf.cache import Layer, build_cache, cache_bytes, enable_rollback, roll_back
from compresskit.methods.kv import int8
from compresskit.methods.kv.int8 import Int8Cache, Int8Layer, dequantise, quantise
from compresskit.methods.speculative.ngram import NGram
from compresskit.traits import Trait


def compressed(system):
    return Int8Cache().apply(system, None)


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
    magnitude=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
    outlier=st.sampled_from([1.0, 100.0]),
)
def test_the_error_is_at_most_half_a_scale(seed, magnitude, outlier):
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed)) * magnitude
    x[..., 0] *= outlier
    codes, scales = quantise(x)
    # One part in 1e5 for rounding in x / scale and codes * scale.
    assert ((dequantise(codes, scales, x.dtype) - x).abs() <= scales * 0.50001).all()
    assert codes.dtype == torch.int8
    assert (codes.abs().amax(-1) == (127 if magnitude else 0)).all()


def test_quantising_what_was_dequantised_changes_nothing():
    x = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise(x)
    again = quantise(dequantise(codes, scales, x.dtype))
    assert torch.equal(again.codes, codes)
    assert torch.allclose(again.scales, scales, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_gets_the_type_of_the_model(dtype):
    layer = Int8Layer()
    keys = torch.randn(1, 2, 4, 8).to(dtype)
    seen, _ = layer.update(keys, keys)
    assert seen.dtype == dtype
    assert layer.key_scales.dtype == torch.float32


def test_bytes_per_token_of_a_135m_model_match_the_reference_figure():
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = LlamaConfig(hidden_size=576, num_hidden_layers=30, **heads)
    cache = build_cache(config, lambda index: Int8Layer())
    for rows in (5, 1, 1):
        for index in range(30):
            cache.update(torch.ones(1, 3, rows, 64), torch.ones(1, 3, rows, 64), index)
    assert cache_bytes(cache) == {"codes": 11_520 * 7, "scales": 720 * 7}


@pytest.mark.parametrize("cuts", [(30,), (1, 2, 3), (29, *range(30, 40))])
def test_results_do_not_depend_on_how_tokens_are_cut_into_passes(lab, architecture, cuts):
    # In float64 the order of a sum cannot move a value across a rounding boundary of the codes.
    system = compressed(lab.system(architecture, double=True))
    tokens = lab.prompt(40)
    whole = continuation(system, tokens, cuts=())
    assert (continuation(system, tokens, cuts=cuts) - whole).abs().max() < 1e-6


def test_full_precision_for_the_newest_tokens_would_depend_on_the_cuts(lab):
    """Negative control: the usual layer, which quantises only behind the current pass."""

    class Late(Int8Layer):
        def update(self, key_states, value_states, *_, **__):
            keys, values = super().update(key_states, value_states)
            new = key_states.shape[-2]
            keys[..., -new:, :], values[..., -new:, :] = key_states, value_states
            return keys, values

    system = lab.system("llama", double=True)
    system = replace(system, new_cache=lambda n: build_cache(system.model.config, lambda i: Late()))
    tokens = lab.prompt(40)
    moved = continuation(system, tokens, cuts=range(1, 40)) - continuation(system, tokens, cuts=())
    assert moved.abs().max() > 1e-3


def test_one_pass_over_a_window_shows_the_error(lab):
    system = lab.system("llama")
    tokens = lab.prompt(40)
    dense = continuation(system, tokens, cuts=())
    assert 0 < divergence(dense, continuation(compressed(system), tokens, cuts=())) < 0.01


def test_three_levels_instead_of_255_are_noticed(lab, monkeypatch):
    """Negative control: if this coarse cache looked harmless, the measurement would be blind."""
    system = lab.system("llama")
    tokens = lab.prompt(40)
    dense = continuation(system, tokens, cuts=())
    fine = divergence(dense, continuation(compressed(system), tokens, cuts=()))
    monkeypatch.setattr(int8, "LEVELS", 1)
    assert divergence(dense, continuation(compressed(system), tokens, cuts=())) > 100 * fine


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
    layer = Int8Layer()
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(1))
    before, _ = layer.update(x, -x)
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 5]))
    layer.crop(-1)
    more = torch.randn(2, 2, 1, 8)
    keys, values = layer.update(more, more)
    assert torch.equal(keys[:, :, :3], before[[2, 1]][:, :, :3])
    assert torch.equal(values[:, :, :3], -before[[2, 1]][:, :, :3])
    assert {getattr(layer, name).shape[:3] for name in layer.tensors} == {(2, 2, 4)}
    layer.reset()
    assert layer.get_seq_length() == 0
    assert torch.equal(layer.update(x, x)[0], before)


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
