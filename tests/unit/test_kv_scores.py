"""Scores by attention equal what eager attention itself returns, on eight architectures."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compresskit.methods.kv import _scores
from compresskit.methods.kv._judged import JudgedLayer
from compresskit.methods.kv._scores import column_sums, pool, probabilities, reduce_heads
from compresskit.methods.kv.h2o import H2O, H2OLayer
from compresskit.methods.kv.snapkv import SnapKV
from compresskit.methods.kv.tova import Tova, TovaLayer

PROMPT, WINDOW, KERNEL = 50, 8, 5
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2},
    "gpt_neox": {},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}
# Initial spread of the weights: the default, whose attention is nearly flat, and one that peaks.
SPREADS = [(0.02, 1e-7), (0.3, 5e-6)]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@functools.cache
def models(architecture: str, spread: float):
    """The same weights twice: with attention of ours or torch's, and with eager attention."""
    torch.manual_seed(0)
    options = {**SHAPE, **ARCHITECTURES[architecture], "initializer_range": spread}
    config = CONFIG_MAPPING[architecture](**options)
    model = AutoModelForCausalLM.from_config(config).eval()
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    return model, eager.eval()


def around(lab, model):
    """A system of `model`."""

    def step(tokens, cache):
        return model(tokens, past_key_values=cache, use_cache=True).logits

    return replace(lab.system("llama"), model=model, step=step)


def spied(monkeypatch, kind):
    """What `kind.score` returns from now on, call by call."""
    seen: list[torch.Tensor] = []
    original = kind.score

    def score(self, call):
        seen.append(original(self, call))
        return seen[-1]

    monkeypatch.setattr(kind, "score", score)
    return seen


def scored(lab, monkeypatch, architecture, spread, method, kind):
    """Our scores and eager's attentions of the full-attention layers, layer by layer."""
    model, eager = models(architecture, spread)
    system = method.apply(around(lab, model), None)
    seen = spied(monkeypatch, kind)
    tokens = lab.prompt(PROMPT)
    system.step(tokens, system.new_cache(PROMPT))
    attentions = eager(tokens, output_attentions=True).attentions
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(attentions)
    full = [one for one, name in zip(attentions, kinds, strict=True) if name == "full_attention"]
    assert len(seen) == len(full) > 0
    return zip(seen, full, strict=True)


def group_mean(scores, shared):
    batch, heads, rows = scores.shape
    return scores.view(batch, shared, heads // shared, rows).mean(2)


def snapkv_score(attention, shared, window=WINDOW):
    prefix = attention[..., -window:, :-window].mean(-2)
    pooled = functional.avg_pool1d(prefix, KERNEL, padding=KERNEL // 2, stride=1)
    return group_mean(pooled, shared)


@pytest.mark.parametrize(("spread", "tolerance"), SPREADS)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_snapkv_scores_are_those_of_eager_attention(
    lab, monkeypatch, architecture, spread, tolerance
):
    method = SnapKV(window=WINDOW, kernel=KERNEL)
    for got, attention in scored(lab, monkeypatch, architecture, spread, method, JudgedLayer):
        expected = snapkv_score(attention, got.shape[1])
        assert (got[..., :-WINDOW] - expected).abs().max() <= tolerance
        assert not got[..., -WINDOW:].any()
        # Negative control: one judge fewer is seen.
        fewer = snapkv_score(attention, got.shape[1], WINDOW - 1)[..., : expected.shape[-1]]
        assert (fewer - expected).abs().max() > 10 * tolerance


@pytest.mark.parametrize(("spread", "tolerance"), SPREADS)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_h2o_sums_are_those_of_eager_attention(lab, monkeypatch, architecture, spread, tolerance):
    # Two queries a block: the sum over blocks is what is tested.
    monkeypatch.setattr(_scores, "BLOCK_NUMBERS", 4 * PROMPT * 2)
    method = H2O(recent=0.0)
    for got, attention in scored(lab, monkeypatch, architecture, spread, method, H2OLayer):
        expected = group_mean(attention.sum(-2), got.shape[1])
        # Sums of 50 probabilities, the largest of them some 10.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=PROMPT * tolerance)
        late = group_mean(attention[..., 1:, :].sum(-2), got.shape[1])
        assert (late - expected).abs().max() > 0.1


@pytest.mark.parametrize(("spread", "tolerance"), SPREADS)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_tova_rows_are_those_of_eager_attention(lab, monkeypatch, architecture, spread, tolerance):
    for got, attention in scored(lab, monkeypatch, architecture, spread, Tova(), TovaLayer):
        expected = attention[:, :, -1].mean(1, keepdim=True).expand_as(got)
        assert (got - expected).abs().max() <= tolerance
        earlier = attention[:, :, -2].mean(1, keepdim=True).expand_as(got)
        assert (earlier - expected).abs().max() > 10 * tolerance


def test_query_heads_agree_as_told():
    """The numbers are those of KVCache-Factory's own tests."""
    scores = torch.tensor([[[1.0, 2], [3, 6], [10, 0], [20, 4]]])
    assert reduce_heads(scores, 2, "mean").tolist() == [[[2, 4], [15, 2]]]
    assert reduce_heads(scores, 2, "max").tolist() == [[[3, 6], [20, 4]]]
    assert reduce_heads(scores, 2, "sum").tolist() == [[[4, 8], [30, 4]]]
    assert torch.equal(reduce_heads(scores, 4, "mean"), scores)
    with pytest.raises(AssertionError):
        reduce_heads(scores, 2, "median")


def test_a_row_that_one_head_needs_is_kept_by_max_and_lost_by_mean():
    scores = torch.full((1, 4, 6), 0.3)
    scores[0, 2, 4] = 0.9
    scores[0, :2, 4], scores[0, 3, 4] = 0.0, 0.0
    assert reduce_heads(scores, 1, "max").argmax() == 4
    assert reduce_heads(scores, 1, "mean").argmin() == 4


def test_pooling_spreads_a_peak_over_its_neighbours():
    scores = torch.tensor([[[0.0, 0, 0, 5, 0, 0, 0]]])
    assert pool(scores, 3, "max").tolist() == [[[0, 0, 5, 5, 5, 0, 0]]]
    assert pool(scores, 5, "avg").tolist() == [[[0, 1, 1, 1, 1, 1, 0]]]
    assert torch.equal(pool(scores, 1, "avg"), scores)


def test_probabilities_are_causal_and_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    keys = torch.randn(2, 2, 9, 8, generator=generator)
    got = probabilities(query, keys, 0.5)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 4, 3))
    assert not got[:, :, 0, 7:].any()
    assert not got[:, :, 1, 8:].any()
    assert got[:, :, 2].all()
    # Head 3 reads the keys of head 1.
    plain = (query[:, 3, 2] * 0.5).unsqueeze(1) @ keys[:, 1].transpose(-1, -2)
    torch.testing.assert_close(got[:, 3, 2], plain.softmax(-1).squeeze(1))


def test_column_sums_never_hold_all_probabilities(monkeypatch):
    """Blocks as small as one query give the same sums, and no block is larger than allowed."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 2, 40, 8, generator=generator)
    keys = torch.randn(1, 1, 45, 8, generator=generator)
    whole = probabilities(query, keys, 0.3).sum(-2)
    sizes: list[int] = []
    original = _scores.probabilities

    def counted(*arguments):
        found = original(*arguments)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(_scores, "probabilities", counted)
    monkeypatch.setattr(_scores, "BLOCK_NUMBERS", 7 * 2 * 45)
    torch.testing.assert_close(column_sums(query, keys, 0.3), whole)
    assert max(sizes) <= 7 * 2 * 45 < query.shape[2] * 2 * 45
    assert len(sizes) == 6
