"""kv/snapkv, kv/pyramid, kv/h2o and kv/tova: budgets, judges from several passes, and what is held."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from compresskit.errors import RunError
from compresskit.hf.cache import cache_bytes
from compresskit.methods.kv._evict import Rule
from compresskit.methods.kv._judged import JudgedLayer
from compresskit.methods.kv._scores import column_sums, probabilities, reduce_heads
from compresskit.methods.kv.h2o import H2O, H2OLayer
from compresskit.methods.kv.pyramid import PyramidKV, layout
from compresskit.methods.kv.snapkv import SnapKV
from compresskit.methods.kv.tova import Tova, TovaLayer


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def drawn(batch, heads, rows, *, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, rows, 8, generator=generator)


class Fed:
    """A layer fed with random text, beside all that it ever saw."""

    def __init__(self, layer, *, rows=60, batch=1):
        self.layer, self.at = layer, 0
        self.keys, self.values = (drawn(batch, 2, rows, seed=seed) for seed in (0, 1))
        self.query = drawn(batch, 4, rows, seed=2)

    def feed(self, make_call, count):
        part = slice(self.at, self.at + count)
        self.at += count
        keys, values = self.layer.update(self.keys[:, :, part], self.values[:, :, part])
        return self.layer.attend(make_call(self.query[:, :, part], keys, values))

    def positions(self):
        """Where in the text each row held comes from: `[B, K, S]`."""
        same = (self.layer.keys.unsqueeze(3) == self.keys.unsqueeze(2)).all(-1)
        assert same.sum(-1).eq(1).all()
        return same.float().argmax(-1)


@pytest.fixture
def make_call(lab):
    from compresskit.hf.attention import Call

    module = lab.system("llama").model.model.layers[0].self_attn
    return lambda query, keys, values: Call(module, query, keys, values, None, 0.35, {})


def judged(**rule):
    return JudgedLayer(Rule(recent=6, **rule), window=6, kernel=3, pooling="avg", heads="mean")


def test_while_holding_the_newest_queries_judge_wherever_they_came_from(make_call):
    """The second drop is by six queries of several passes; they equal those of one pass."""
    fed = Fed(judged(tokens=20, hold=True, interval=5))
    fed.feed(make_call, 30)
    for step in (1, 2, 1):
        fed.feed(make_call, step)
    before = fed.positions()
    assert before.shape[-1] == 24
    expected = fed.query[:, :, 29:35]
    fed.feed(make_call, 1)
    assert torch.equal(fed.layer.queries, expected)
    rows = torch.cat((before, torch.full((1, 2, 1), 34)), -1)
    keys = fed.keys.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, 8))
    attention = probabilities(expected, keys, 0.35)[..., :-6].mean(-2)
    pooled = torch.nn.functional.avg_pool1d(attention, 3, padding=1, stride=1)
    best = reduce_heads(pooled, 2, "mean").topk(14).indices.sort().values
    wanted = torch.cat((rows.gather(-1, best), rows[..., -6:]), -1)
    assert torch.equal(fed.positions(), wanted)


def test_what_the_judges_look_at_stays_and_the_rest_goes(make_call):
    """Two heads keep rows of their own choice; the window stays."""
    fed = Fed(JudgedLayer(Rule(tokens=9, recent=6), window=6, kernel=1, pooling="avg", heads="max"))
    fed.keys[:, 0, 3] = 9 * fed.query[:, 0, 28]
    fed.keys[:, 1, 17] = 9 * fed.query[:, 2, 27]
    fed.feed(make_call, 30)
    first, second = fed.positions()[0].tolist()
    assert 3 in first
    assert 17 in second
    assert first[-6:] == second[-6:] == [24, 25, 26, 27, 28, 29]
    assert first != second


def test_judges_are_held_and_counted_only_where_they_are_needed(lab):
    for decoding, index in (("grow", 0), ("hold", 2 * 4 * 6 * 8 * 4)):
        system = SnapKV(window=6, decoding=decoding).apply(lab.system("llama"), None)
        cache = system.new_cache(64)
        system.step(lab.prompt(40), cache)
        assert cache_bytes(cache).get("index", 0) == index


def test_h2o_adds_up_over_passes_what_one_pass_would_give(make_call):
    """Nothing is dropped here: sums over three passes equal those of all queries at once."""
    fed = Fed(H2OLayer(Rule(tokens=60, hold=True), recent=0.5))
    for count in (20, 1, 9):
        fed.feed(make_call, count)
    whole = column_sums(fed.query[:, :, :30], fed.keys[:, :, :30], 0.35)
    torch.testing.assert_close(fed.layer.mass.squeeze(-1), reduce_heads(whole, 2, "mean"))


def test_h2o_sums_go_with_their_rows(make_call):
    fed = Fed(H2OLayer(Rule(tokens=12, hold=True, interval=4), recent=0.5))
    fed.feed(make_call, 30)
    sums = reduce_heads(column_sums(fed.query[:, :, :30], fed.keys[:, :, :30], 0.35), 2, "mean")
    kept = fed.positions()
    torch.testing.assert_close(fed.layer.mass.squeeze(-1), sums.gather(-1, kept))
    assert kept[..., -6:].eq(torch.arange(24, 30)).all()
    wanted = sums[..., :24].topk(6).indices.sort().values
    assert torch.equal(kept[..., :6], wanted)


def test_h2o_holds_no_sums_once_nobody_will_ask(lab):
    for decoding in ("grow", "hold"):
        system = H2O(ratio=0.5, decoding=decoding).apply(lab.system("llama"), None)
        cache = system.new_cache(64)
        system.step(lab.prompt(40), cache)
        assert cache_bytes(cache).get("index", 0) == (2 * 2 * 20 * 4 if decoding == "hold" else 0)


def test_tova_keeps_the_same_tokens_in_all_heads_and_none_by_rule(make_call):
    fed = Fed(TovaLayer(Rule(tokens=10, hold=True)))
    # Nobody looks at the newest token: keys far from all queries.
    fed.keys[:, :, 29] = -5 * fed.query[:, :, 29].mean(1, keepdim=True)
    fed.feed(make_call, 30)
    first, second = fed.positions()[0].tolist()
    assert first == second
    attention = probabilities(fed.query[:, :, 29:30], fed.keys[:, :, :30], 0.35).mean(1)[0, 0]
    assert first == sorted(attention.topk(10).indices.tolist())
    assert 29 not in first


METHODS = [
    SnapKV(ratio=0.5, window=8),
    SnapKV(ratio=0.5, window=8, pooling="max", heads="sum", decoding="hold", interval=3),
    PyramidKV(ratio=0.5, window=4),
    H2O(ratio=0.5, decoding="hold", interval=3),
    Tova(ratio=0.5, interval=1),
]
NAMES = ["snapkv", "snapkv hold", "pyramid", "h2o hold", "tova"]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_batch_of_equal_lengths_equals_its_rows_alone(lab, architecture, method):
    system = method.apply(lab.system(architecture), None)
    prompts = [lab.prompt(30, seed=seed) for seed in range(2)]
    together = lab.rows(system.generate(lab.request(torch.cat(prompts), 12)))
    assert together == [lab.rows(system.generate(lab.request(p, 12)))[0] for p in prompts]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_ratio_zero_is_bit_equal_to_the_dense_cache(lab, architecture, method):
    dense = lab.system(architecture)
    changed = type(method)(**{**method.model_dump(), "ratio": 0.0, "decoding": "grow"})
    system = changed.apply(dense, None)
    tokens = lab.prompt(40)
    caches = dense.new_cache(40), system.new_cache(40)
    for part in (tokens[:, :30], *tokens[:, 30:].split(1, dim=1)):
        expected, got = (
            one.step(part, cache) for one, cache in zip((dense, system), caches, strict=True)
        )
        assert torch.equal(expected, got)


CLOSING_UP = SnapKV(window=8, decoding="hold", interval=3, positions="contiguous")


@pytest.mark.parametrize("method", [*METHODS, CLOSING_UP], ids=[*NAMES, "contiguous"])
def test_a_reset_leaves_nothing(lab, method):
    system = method.apply(lab.system("llama"), None)
    cache = system.new_cache(64)
    first = [system.step(lab.prompt(30), cache), system.step(lab.prompt(1), cache)]
    for _ in range(6):
        system.step(lab.prompt(1), cache)
    cache.reset()
    assert set(cache_bytes(cache)) <= {"other"}  # the model's rotary frequencies
    again = [system.step(lab.prompt(30), cache), system.step(lab.prompt(1), cache)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("method", [*METHODS, CLOSING_UP], ids=[*NAMES, "contiguous"])
def test_beams_move_everything_that_is_held(lab, method):
    """Two beams swapped: each goes on as the other would have."""
    system = method.apply(lab.system("llama"), None)
    tokens = torch.cat((lab.prompt(30), lab.prompt(30, seed=1)))
    rest = torch.cat((lab.prompt(6, seed=2), lab.prompt(6, seed=3)))
    ahead, swapped = system.new_cache(40), system.new_cache(40)
    for cache in (ahead, swapped):
        system.step(tokens, cache)
        system.step(rest[:, :1], cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    for at in range(1, 6):
        step = rest[:, at : at + 1]
        expected, got = system.step(step, ahead), system.step(step.flip(0), swapped)
        torch.testing.assert_close(got, expected.flip(0))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_plain_generate_gives_the_same_tokens(lab, method):
    system = method.apply(lab.system("llama"), None)
    tokens = lab.prompt(30)
    expected = lab.rows(system.generate(lab.request(tokens, 12)))
    cache = system.new_cache(42)
    got = system.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=12,
        do_sample=False,
    )
    assert got[:, 30:].tolist() == expected


def test_a_prompt_no_longer_than_the_window_stays_whole(lab):
    dense = lab.system("llama")
    system = SnapKV(ratio=0.9, window=16).apply(dense, None)
    caches = dense.new_cache(20), system.new_cache(20)
    outs = [
        [one.step(lab.prompt(16), cache), one.step(lab.prompt(1), cache)]
        for one, cache in zip((dense, system), caches, strict=True)
    ]
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))
    longer = system.new_cache(40)
    system.step(lab.prompt(17), longer)
    assert longer.layers[0].keys.shape[-2] == 16


def test_what_cannot_be_asked_for():
    with pytest.raises(ValidationError, match="smaller than the 64"):
        SnapKV(tokens=63)
    with pytest.raises(ValidationError, match="must be odd"):
        SnapKV(kernel=4)
    with pytest.raises(ValidationError, match="window"):
        SnapKV(window=0)
    with pytest.raises(ValidationError, match="heads"):
        SnapKV(heads="median")


def test_scores_need_the_attention_call():
    for layer in (judged(), TovaLayer(Rule()), H2OLayer(Rule(), recent=0.5)):
        with pytest.raises(RunError, match="after attention"):
            layer.score(None)


# NVIDIA's kvpress checks its own pyramid by these grids.
@pytest.mark.parametrize("layers", [32, 64, 128])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.8])
@pytest.mark.parametrize("prompt", [1024, 2787, 4096, 6591, 8192])
def test_a_pyramid_has_the_mean_that_was_asked_for(layers, ratio, prompt):
    rows = PyramidKV(ratio=ratio).layout(prompt, layers)
    assert len(rows) == layers
    assert sum(rows) / layers == pytest.approx(prompt * (1 - ratio), rel=1e-3)
    assert rows == sorted(rows, reverse=True)
    assert 64 <= rows[-1] <= rows[0] <= prompt


def test_pyramids_worked_by_hand():
    """Window 64, beta 20, 32 layers: the numbers come from kvpress' formula on paper."""
    rows = PyramidKV(ratio=0.5).layout(1024, 32)
    assert rows[:3] + rows[-3:] == [960, 931, 902, 122, 93, 64]
    rows = PyramidKV(ratio=0.3).layout(2787, 32)
    assert rows[:2] + rows[-2:] == [2723, 2673, 1229, 1179]
    assert set(PyramidKV(ratio=0.75).layout(4096, 32)) == {1024}
    assert set(PyramidKV(ratio=0.8).layout(1024, 32)) == {205}
    # A budget in tokens is the mean as well; one layer has no pyramid; beta 1 is flat.
    assert PyramidKV(tokens=512).layout(1024, 32) == PyramidKV(ratio=0.5).layout(1024, 32)
    assert PyramidKV(ratio=0.5).layout(1024, 1) == [512]
    assert set(layout(4096, 1500, 8, window=64, beta=1)) == {1500}
    assert set(layout(4096, 1500, 8, window=64, beta=20)) != {1500}


def test_the_pyramid_that_was_used_is_a_fact(lab):
    system = PyramidKV(ratio=0.5, window=4).apply(lab.system("llama"), None)
    cache = system.new_cache(64)
    system.step(lab.prompt(40), cache)
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert held == [36, 4]
    assert system.facts["cache_rows_by_layer"] == {"40": held}


def test_sliding_layers_have_no_share_in_the_pyramid(lab):
    """The one full layer of this model is number 1 of 3, and keeps the mean."""
    system = PyramidKV(ratio=0.5, window=4).apply(lab.system("gemma3_text"), None)
    cache = system.new_cache(64)
    system.step(lab.prompt(40), cache)
    assert cache.layers[1].keys.shape[-2] == 20
    assert system.facts["cache_rows_by_layer"] == {"40": [20]}
