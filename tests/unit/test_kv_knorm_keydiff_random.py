"""What the methods that look at no attention score, and that the control is one."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch

from compresskit.hf.cache import cache_bytes
from compresskit.method import Context
from compresskit.methods.kv._evict import Rule
from compresskit.methods.kv.keydiff import KeyDiff, KeyDiffLayer
from compresskit.methods.kv.knorm import Knorm, KnormLayer
from compresskit.methods.kv.random import RandomEviction, RandomLayer

CONTEXT = Context(load=None, calibration=None, seed=0, dtype="float32")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def held(layer, keys):
    """`layer` after a prompt of those keys; values are the row numbers."""
    numbers = torch.arange(float(keys.shape[2])).view(1, 1, -1, 1).expand(*keys.shape[:3], 1)
    layer.update(keys, numbers.clone())
    return layer.values[..., 0].long()


def some_keys(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_knorm_keeps_the_short_keys():
    keys = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 0.0], [2.0, 0.0], [0.0, 3.0]])[None, None]
    # norms 5, 1, 6, 2, 3
    assert held(KnormLayer(Rule(tokens=3)), keys).tolist() == [[[1, 3, 4]]]


def test_knorm_scores_in_float32():
    """float16 overflows at 65504: the square of a key of 300 does."""
    keys = torch.tensor([[300.0, 0.0], [400.0, 0.0], [310.0, 0.0]], dtype=torch.float16)[None, None]
    assert held(KnormLayer(Rule(tokens=2)), keys).tolist() == [[[0, 2]]]


def test_keydiff_keeps_the_key_that_is_unlike_the_others():
    """By hand: three keys near the x axis, one along y; length does not matter."""
    keys = torch.tensor([[1.0, 0.0], [9.0, 0.1], [0.0, 0.2], [2.0, 0.1]])[None, None]
    assert held(KeyDiffLayer(Rule(tokens=1)), keys).tolist() == [[[2]]]


def test_keydiff_is_the_formula_of_the_paper():
    keys = some_keys(2, 3, 40, 8)
    layer = KeyDiffLayer(Rule(share=1.0))
    layer.update(keys, keys)
    k = keys.double().numpy()
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    anchor = unit.mean(axis=2, keepdims=True)
    cosine = (k * anchor).sum(-1) / (np.linalg.norm(k, axis=-1) * np.linalg.norm(anchor, axis=-1))
    np.testing.assert_allclose(layer.score(None).numpy(), -cosine, atol=1e-6)
    # Negative control: the mean of the keys as they are is another anchor.
    other = k.mean(axis=2, keepdims=True)
    raw = (unit * other).sum(-1) / np.linalg.norm(other, axis=-1)
    assert np.abs(layer.score(None).numpy() + raw).max() > 1e-2


def test_random_is_the_same_every_time_and_other_for_each_seed_layer_head_and_length():
    keys = some_keys(1, 2, 60, 4)
    rule = Rule(tokens=20, seed=3)
    first = held(RandomLayer(rule, 0), keys)
    assert torch.equal(held(RandomLayer(rule, 0), keys), first)
    assert not torch.equal(first[0, 0], first[0, 1])
    assert not torch.equal(held(RandomLayer(rule, 1), keys), first)
    assert not torch.equal(held(RandomLayer(rule._replace(seed=4), 0), keys), first)
    assert not torch.equal(held(RandomLayer(rule, 0), keys[:, :, :59]), first)


def test_random_does_not_look_at_keys():
    rule = Rule(tokens=20)
    one, other = (held(RandomLayer(rule, 0), some_keys(1, 2, 60, 4, seed=seed)) for seed in (0, 1))
    assert torch.equal(one, other)
    # Negative control: the others do.
    one, other = (held(KnormLayer(rule), some_keys(1, 2, 60, 4, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one, other)


def test_random_is_the_same_for_every_row_of_a_batch():
    rows = held(RandomLayer(Rule(tokens=20), 0), some_keys(3, 2, 60, 4))
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_random_keeps_each_row_equally_often():
    """Exact binomial bounds: 600 draws of 5 out of 20, each row expected 150 times."""
    keys = some_keys(1, 1, 20, 2)
    counts = torch.zeros(20, dtype=torch.long)
    for seed in range(600):
        counts[held(RandomLayer(Rule(tokens=5, seed=seed), 0), keys)[0, 0]] += 1
    chance = [comb(600, n) * 0.25**n * 0.75 ** (600 - n) for n in range(601)]
    low = next(n for n in range(601) if sum(chance[: n + 1]) > 1e-6)
    high = next(n for n in range(600, -1, -1) if sum(chance[n:]) > 1e-6)
    assert counts.sum() == 3000
    assert low <= counts.min()
    assert counts.max() <= high
    assert 90 < low < 150 < high < 210, "the bounds exclude a row that is favoured"


def test_the_seed_of_the_run_reaches_the_layers(lab):
    system = lab.system("llama")
    tokens = lab.prompt(24)

    def answer(method, seed):
        changed = method.apply(system, replace(CONTEXT, seed=seed))
        return lab.rows(changed.generate(lab.request(tokens, 12)))

    control = RandomEviction(ratio=0.8)
    assert answer(control, 1) == answer(control, 1)
    assert len({str(answer(control, seed)) for seed in range(4)}) > 1
    # Negative control: nothing else depends on it.
    assert answer(Knorm(ratio=0.8), 1) == answer(Knorm(ratio=0.8), 2)


@pytest.mark.parametrize(
    "method", [Knorm(ratio=0.7), KeyDiff(ratio=0.7), RandomEviction(ratio=0.7)]
)
def test_all_hold_the_same_bytes_at_the_same_ratio(lab, method):
    """What makes the control a fair one."""
    system = method.apply(lab.system("llama"), CONTEXT)
    cache = system.new_cache(64)
    system.step(lab.prompt(40), cache)
    assert cache_bytes(cache) == {"keys_values": 2 * 2 * 2 * 12 * 8 * 4}
    assert system.facts["cache_nominal"] == {"keep_share": pytest.approx(0.3)}


def test_facts_say_what_is_kept_and_how(lab):
    said = {
        Knorm(ratio=0.75): "25% of the prompt by score, grow while decoding",
        KeyDiff(tokens=64, decoding="hold"): "64 tokens by score, hold while decoding",
        RandomEviction(): "50% of the prompt by lot, grow while decoding",
    }
    for method, phrase in said.items():
        assert method.apply(lab.system("llama"), CONTEXT).facts["cache"] == phrase
    system = KeyDiff(tokens=64).apply(lab.system("llama"), CONTEXT)
    assert system.facts["cache_nominal"] == {"keep_tokens": 64}
