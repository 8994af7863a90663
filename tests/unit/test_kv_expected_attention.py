"""kv/expected_attention: its scores are those of the formula, from queries as the model projects them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from compresskit.errors import Conflict
from compresskit.hf.attention import Call
from compresskit.hf.cache import cache_bytes
from compresskit.hf.rotary import Rotary
from compresskit.methods.kv._evict import Rule
from compresskit.methods.kv._unrotated import Positions
from compresskit.methods.kv.expected_attention import (
    ExpectedAttention,
    ExpectedLayer,
    average_turn,
    expectation,
)

SINK, FUTURE, PROMPT = 4, 24, 40


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def scores_of(system, tokens, monkeypatch):
    """What each layer's `score` returns for a prompt."""
    seen = []
    original = ExpectedLayer.score

    def score(self, call):
        seen.append(original(self, call))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(ExpectedLayer, "score", score)
        system.step(tokens, system.new_cache(len(tokens)))
    return seen


def rotation(model, start, count):
    """Mean rotation matrix `[D, D]` of these positions, from the model's own cosines and sines."""
    places = torch.arange(start, start + count).unsqueeze(0)
    cos, sin = model.model.rotary_emb(torch.zeros(1), places)
    width = cos.shape[-1]
    half = width // 2
    swap = torch.zeros(width, width)
    swap[half:, :half], swap[:half, half:] = torch.eye(half), -torch.eye(half)
    each = cos[0].unsqueeze(-1) * torch.eye(width) + sin[0].unsqueeze(-1) * swap
    return each.mean(0)


def by_the_formula(model, tokens, index, *, square=True):
    """Scores of layer `index` as NVIDIA's kvpress defines them, but for how queries are had."""
    attention = model.model.layers[index].self_attn
    caught = {}
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True
    )
    cache = model(tokens, use_cache=True).past_key_values
    hook.remove()
    keys, values = cache.layers[index].keys, cache.layers[index].values
    query = attention.q_proj(caught["hidden_states"]).view(1, PROMPT, 4, 8).transpose(1, 2)
    query = query[:, :, SINK:]
    turn = rotation(model, PROMPT, FUTURE)
    mean = query.mean(2) @ turn.T
    covariance = torch.stack([torch.cov(head.T, correction=0) for head in query[0]])
    covariance = turn @ covariance @ turn.T
    wide = keys[:, :, SINK:].repeat_interleave(2, dim=1)
    scores = (wide @ mean.unsqueeze(-1)).squeeze(-1) / math.sqrt(8)
    if square:
        scores = scores + torch.einsum("bhsd,hde,bhse->bhs", wide, covariance, wide) / 8 / 2
    shared = scores.softmax(-1).view(1, 2, 2, -1).mean(2)
    return shared * values[:, :, SINK:].norm(dim=-1)


def test_scores_are_those_of_the_formula(lab, monkeypatch):
    dense = lab.system("llama")
    tokens = lab.prompt(PROMPT)
    expected = [by_the_formula(dense.model, tokens, index) for index in range(2)]
    linear = by_the_formula(dense.model, tokens, 1, square=False)
    system = ExpectedAttention(future=FUTURE, sink=SINK).apply(dense, None)
    got = scores_of(system, tokens, monkeypatch)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[..., SINK:], other, rtol=1e-3, atol=1e-5)
    # Negative control: without the covariance the scores are others.
    assert (got[1][..., SINK:] - linear).abs().max() > 1e-2 * linear.max()


def test_the_exponent_is_the_mean_over_normal_queries():
    """log E[exp(scale q k)] by drawing queries, instead of the formula."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 6, 4, generator=generator)
    root = torch.randn(4, 4, generator=generator) / 2
    mean = torch.randn(1, 1, 1, 4, generator=generator)
    drawn = mean[0, 0] + torch.randn(200_000, 4, generator=generator) @ root.T
    sampled = (0.5 * drawn @ keys[0, 0].T).exp().mean(0)
    got = expectation(keys, mean, (root @ root.T)[None, None], 0.5)
    torch.testing.assert_close(got[0, 0], sampled / sampled.sum(), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_average_turn_is_the_mean_of_all_turns(lab, name):
    """Also where only a part of each head is rotated."""
    rotary = Rotary.of(lab.system(name).model)
    x = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(30, 47).view(1, 1, -1)
    each = rotary.move(x.expand(1, 2, 17, 8), places)
    got = average_turn(x, rotary, 30, 17)
    torch.testing.assert_close(got, each.mean(2, keepdim=True))
    assert (got - x).abs().max() > 0.1


def test_queries_of_several_passes_count_as_in_one(lab):
    """Mean and covariance while holding: of all queries so far, merged."""
    system = ExpectedAttention(tokens=64, decoding="hold", sink=2).apply(lab.system("llama"), None)
    tokens = lab.prompt(30)
    whole, parts = system.new_cache(30), system.new_cache(30)
    system.step(tokens, whole)
    for part in tokens.split((1, 12, 1, 16), dim=1):
        system.step(part, parts)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one.judges == other.judges == 28
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.spread, other.spread, rtol=1e-3, atol=1e-2)


def test_blocks_give_the_same_as_one_product(lab, monkeypatch):
    system = ExpectedAttention(future=FUTURE).apply(lab.system("llama"), None)
    tokens = lab.prompt(PROMPT)
    whole = scores_of(system, tokens, monkeypatch)
    monkeypatch.setattr("compresskit.methods.kv.expected_attention.BLOCK", 7)
    blocks = scores_of(system, tokens, monkeypatch)
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_head_keeps_the_key_that_its_queries_agree_with(lab):
    """Without positions: all queries are alike, and one key is along them."""
    layer = ExpectedLayer(Rule(tokens=5, sink=2), Positions(None), sink=2, future=FUTURE)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 30, 8, generator=generator) for _ in range(2))
    query = torch.ones(1, 4, 30, 8) + torch.randn(1, 4, 30, 8, generator=generator) / 10
    keys[:, 0, 11], keys[:, 1, 19] = 2.0, 2.0
    # A value of nothing is worth nothing, however much attention it gets.
    keys[:, 0, 20], values[:, 0, 20] = 2.0, 0.0
    handed, rows = layer.update(keys, values)
    module = lab.system("llama").model.model.layers[0].self_attn
    layer.attend(Call(module, query, handed, rows, None, 0.35, {}))
    held = layer.keys[0, :, 2:, 0].eq(2.0) & layer.keys[0, :, 2:, 7].eq(2.0)
    assert held.sum(-1).tolist() == [1, 1]
    assert torch.equal(layer.keys[..., :2, :], keys[..., :2, :])
    assert layer.values[0, 0].norm(dim=-1).min() > 0


def test_it_runs_on_every_architecture_and_holds_what_it_says(lab, architecture):
    for decoding, more in (("grow", 0), ("hold", 1)):
        method = ExpectedAttention(ratio=0.5, decoding=decoding, future=FUTURE)
        system = method.apply(lab.system(architecture), None)
        cache = system.new_cache(64)
        system.step(lab.prompt(40), cache)
        full = [layer for layer in cache.layers if isinstance(layer, ExpectedLayer)]
        assert all(layer.keys.shape[-2] == 20 for layer in full)
        index = len(full) * 4 * (8 + 64) * 4
        assert cache_bytes(cache).get("index", 0) == more * index


def test_ratio_zero_is_bit_equal_to_the_dense_cache(lab, architecture):
    dense = lab.system(architecture)
    system = ExpectedAttention(ratio=0.0).apply(dense, None)
    caches = dense.new_cache(40), system.new_cache(40)
    tokens = lab.prompt(40)
    for part in (tokens[:, :30], *tokens[:, 30:].split(1, dim=1)):
        expected, got = (
            one.step(part, cache) for one, cache in zip((dense, system), caches, strict=True)
        )
        assert torch.equal(expected, got)


def test_a_reset_forgets_the_queries(lab):
    system = ExpectedAttention(tokens=16, decoding="hold", interval=2).apply(
        lab.system("llama"), None
    )
    cache = system.new_cache(64)
    first = system.step(lab.prompt(30), cache)
    cache.reset()
    assert cache.layers[0].judges == 0
    assert set(cache_bytes(cache)) <= {"other"}
    assert torch.equal(system.step(lab.prompt(30), cache), first)
    assert cache.layers[0].judges == 26


def test_positions_that_cannot_be_taken_off_are_refused(lab):
    from transformers import AutoModelForCausalLM

    dense = lab.system("llama")
    config = type(dense.model.config)(
        **{
            **dense.model.config.to_dict(),
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        }
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Conflict, match=r"kv/expected_attention.*llama.*kv/snapkv"):
        ExpectedAttention().apply(replace(dense, model=model), None)
