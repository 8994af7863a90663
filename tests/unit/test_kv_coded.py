"""Layers of codes: attention over codes is attention over what they stand for, everywhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.kv_decode import native
from compresskit_kernels.native import build
from transformers import LlamaConfig, LlamaForCausalLM

from compresskit.errors import RunError
from compresskit.hf import attention
from compresskit.hf.cache import build_cache
from compresskit.methods.kv._coded import CodedLayer, PerTokenLayer
from compresskit.methods.kv.int8 import Int8Layer
from compresskit.methods.kv.kivi import KiviLayer

LAYERS = {
    "int8": Int8Layer,
    "fp8": lambda config: PerTokenLayer(config, "fp8"),
    "kivi4": lambda config: KiviLayer(config, bits=4, group=16, residual=16),
    "kivi2": lambda config: KiviLayer(config, bits=2, group=32, residual=32),
}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model():
    """Heads of 32 numbers, which the native kernel reads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, vocab_size=100, initializer_range=0.15,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    attention.use(model)
    return model


def logits(model, kind, cuts, *, mask=None, rows=1):
    """Of all tokens behind the first cut, fed in passes that end at `cuts`."""
    cache = build_cache(model.config, lambda index: LAYERS[kind](model.config))
    tokens = torch.arange(rows * cuts[-1]).remainder(97).view(rows, -1)
    out, start = [], 0
    for end in cuts:
        seen = None if mask is None else mask[:, :end]
        out.append(model(tokens[:, start:end], past_key_values=cache, attention_mask=seen).logits)
        start = end
    return torch.cat(out[1:], dim=1)


CUTS = [(20, *range(21, 40)), (20, 24, 31, 39), (1, 9, 10, 30, 35)]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_reading_codes_is_reading_what_they_stand_for(model, kind, cuts, monkeypatch):
    dispatch.reset()
    read = logits(model, kind, cuts)
    assert "kv_decode" in dispatch.used()
    monkeypatch.setattr(CodedLayer, "fused", False)
    dispatch.reset()
    dense = logits(model, kind, cuts)
    assert "kv_decode" not in dispatch.used()
    dispatch.reset()
    # Rounding of the hidden state may move a number across the border of two codes.
    assert (read - dense).abs().max() < 0.02 * dense.std()
    assert ((read - dense).abs() > 1e-4 * dense.std()).float().mean() < 0.5


@pytest.mark.skipif(not build.available(), reason=build.reason())
@pytest.mark.parametrize("kind", LAYERS)
def test_the_native_kernel_reads_them(model, kind):
    dispatch.reset()
    logits(model, kind, CUTS[0])
    assert dispatch.used()["kv_decode"] == (native.ATTEND.routine,)
    dispatch.reset()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_left_padded_row_is_the_row_alone(model, kind):
    cuts = (20, *range(21, 30))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    cache = build_cache(model.config, lambda index: LAYERS[kind](model.config))
    tokens = torch.arange(60).remainder(97).view(2, -1)
    alone, start = [], 5
    for end in cuts:
        alone.append(model(tokens[:1, start:end], past_key_values=cache).logits)
        start = end
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = build_cache(model.config, lambda index: LAYERS[kind](model.config))
    together, start = [], 0
    for end in cuts:
        together.append(
            model(
                tokens[:, start:end], past_key_values=padded, attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
            ).logits[:1]
        )  # fmt: skip
        start = end
    want = torch.cat(alone[1:], dim=1)
    assert (torch.cat(together[1:], dim=1) - want).abs().max() < 0.02 * want.std()
    blind = logits(model, kind, cuts, rows=2)[:1]
    assert (blind - want).abs().max() > 0.2 * want.std(), "the mask makes a difference"


@pytest.mark.parametrize("kind", LAYERS)
def test_another_attention_function_is_refused(kind):
    """It would take the new rows for the whole cache."""
    config = SimpleNamespace(_attn_implementation=attention.NAME)
    layer, x = LAYERS[kind](config), torch.ones(1, 2, 3, 32)
    layer.update(x, x)
    config._attn_implementation = "sdpa"
    with pytest.raises(RunError, match="attends with 'sdpa' now"):
        layer.update(x, x)


def test_changing_the_attention_of_a_model_is_noticed(model):
    cache = build_cache(model.config, lambda index: Int8Layer(model.config))
    model(torch.arange(5)[None], past_key_values=cache)
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(RunError, match="'eager'"):
            model(torch.arange(1)[None], past_key_values=cache)
    finally:
        model.set_attn_implementation(attention.NAME)


def test_a_mask_of_ones_own_goes_the_dense_way(model):
    """`kv_decode` knows causal tokens and unseen slots, not a row for each query."""
    cache = build_cache(model.config, lambda index: Int8Layer(model.config))
    tokens = torch.arange(20)[None]
    model(tokens[:, :17], past_key_values=cache)
    seen = torch.ones(1, 1, 3, 20, dtype=torch.bool).tril(17)
    seen[0, 0, 1, :10] = False
    dispatch.reset()
    got = model(tokens[:, 17:], past_key_values=cache, attention_mask=seen).logits
    assert "kv_decode" not in dispatch.used()
    dispatch.reset()
    plain = build_cache(model.config, lambda index: Int8Layer(model.config))
    model(tokens[:, :17], past_key_values=plain)
    other = model(tokens[:, 17:], past_key_values=plain).logits
    assert torch.allclose(got[:, 0], other[:, 0], atol=1e-3)
    assert (got[:, 1] - other[:, 1]).abs().max() > 1e-2
