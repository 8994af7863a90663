"""What all evicting caches promise: budgets, exactness, and clear refusals, on every architecture."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from pydantic import ValidationError
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from compresskit import catalogue
from compresskit.errors import Conflict, RunError, SpecError
from compresskit.hf import attention
from compresskit.hf.cache import cache_bytes, enable_rollback, new_dynamic
from compresskit.hf.step import eager_step
from compresskit.method import Context
from compresskit.methods.kv._evict import EFFECTS, Evict, EvictingLayer, Rule, select, take
from compresskit.methods.kv.keydiff import KeyDiff
from compresskit.methods.kv.knorm import Knorm, KnormLayer
from compresskit.methods.kv.random import RandomEviction
from compresskit.methods.kv.sink_window import SinkWindow
from compresskit.traits import Trait

CONTEXT = Context(load=None, calibration=None, seed=0, dtype="float32")
HOLD = {"decoding": "hold", "interval": 3}
EVICTING = {
    "knorm": Knorm(ratio=0.5),
    "keydiff": KeyDiff(ratio=0.4),
    "random": RandomEviction(ratio=0.5),
    "knorm hold": Knorm(ratio=0.6, **HOLD),
    "keydiff hold": KeyDiff(tokens=7, decoding="hold", interval=1),
    "random hold": RandomEviction(tokens=8, **HOLD),
    "sink window": SinkWindow(sink=2, window=6),
}
CUTS = (14, 15, 16, 20, *range(21, 30))
"""A prompt, single tokens, a pass of four, single tokens."""
ROTARY = ["llama", "qwen2", "qwen3", "olmo2", "gpt_neox", "mixtral", "gemma3_text"]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=sorted(EVICTING))
def method(request):
    return EVICTING[request.param]


def forced(system, tokens, *, cuts=CUTS):
    """Logits of all tokens, fed in passes that end at `cuts`."""
    cache, logits, start = system.new_cache(tokens.shape[-1]), [], 0
    for end in (*cuts, tokens.shape[-1]):
        logits.append(system.step(tokens[:, start:end], cache, keep=0))
        start = end
    return torch.cat(logits, dim=1)


def generated(system, tokens, new, **options):
    """Tokens that plain `model.generate()` adds, with a cache of the system."""
    out = system.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=system.new_cache(tokens.shape[-1] + new),
        max_new_tokens=new,
        do_sample=False,
        **options,
    )
    return out[:, tokens.shape[-1] :].tolist()


# Exactness


EXACT = [
    {"ratio": 0.0},
    {"ratio": 0.0, **HOLD, "tokens": 200},
    {"tokens": 30},
    {"tokens": 200, "decoding": "hold", "interval": 1},
]


@pytest.mark.parametrize("options", EXACT)
@pytest.mark.parametrize("cls", [Knorm, KeyDiff, RandomEviction])
def test_a_budget_for_everything_is_bit_equal_to_the_dense_cache(lab, architecture, cls, options):
    system = lab.system(architecture)
    attention.use(system.model)
    tokens = lab.prompt(30)
    dense = forced(system, tokens)
    places = ["original"] if architecture == "gpt2" else ["original", "contiguous"]
    for positions in places:
        exact = cls(positions=positions, **options).apply(system, CONTEXT)
        assert torch.equal(forced(exact, tokens), dense)


def test_bit_equality_tells_one_row_less(lab, architecture):
    """Negative control."""
    system = lab.system(architecture)
    attention.use(system.model)
    tokens = lab.prompt(30)
    dense = forced(system, tokens)
    short = Knorm(tokens=13).apply(system, CONTEXT)
    assert torch.equal(forced(short, tokens)[:, :14], dense[:, :14])
    assert not torch.equal(forced(short, tokens), dense)


def spelled_out(module, query, key, value, attention_mask, scaling=None, **_):
    """Softmax attention written out; a layer in `spelled_out.masks` sees what is said there."""
    mask = spelled_out.masks.get(module.layer_idx)
    if mask is None:
        new, rows = query.shape[2], key.shape[2]
        mask = (
            torch.ones(new, rows, dtype=torch.bool).tril()
            if attention_mask is None
            else attention_mask
        )
    groups = query.shape[1] // key.shape[1]
    if mask.shape[-3:-2] == (key.shape[1],):
        mask = mask.repeat_interleave(groups, dim=1)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


spelled_out.masks = {}
AttentionInterface.register("spelled_out", spelled_out)
AttentionMaskInterface.register("spelled_out", sdpa_mask)


def watched(system, tokens, *, cuts=CUTS):
    """Logits as `forced`, and what each head of each evicting layer saw: bool `[1, K, T, T]`."""
    length, log = tokens.shape[-1], {}
    keep = EvictingLayer.keep

    def noted(layer, kept):
        log[id(layer)] = kept
        keep(layer, kept)

    cache, logits, start = system.new_cache(length), [], 0
    layers = {i: one for i, one in enumerate(cache.layers) if isinstance(one, EvictingLayer)}
    seen, held = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvictingLayer, "keep", noted)
        for end in (*cuts, length):
            log.clear()
            logits.append(system.step(tokens[:, start:end], cache, keep=0))
            for index, layer in layers.items():
                heads = layer.keys.shape[1]
                if index not in seen:
                    seen[index] = torch.zeros(1, heads, length, length, dtype=torch.bool)
                    held[index] = torch.zeros(1, heads, 0, dtype=torch.long)
                new = torch.arange(start, end).expand(1, heads, -1)
                rows = torch.zeros(1, heads, length, dtype=torch.bool).scatter(2, held[index], True)
                causal = torch.arange(start, end)[:, None] >= torch.arange(length)
                fresh = causal & (torch.arange(length) >= start)
                seen[index][:, :, start:end] = rows[:, :, None] | fresh
                held[index] = torch.cat((held[index], new), dim=-1)
                if id(layer) in log:
                    held[index] = held[index].gather(2, log[id(layer)])
            start = end
    return torch.cat(logits, dim=1), seen


@pytest.mark.parametrize("name", [name for name in EVICTING if name != "sink window"])
def test_it_equals_a_dense_pass_with_each_heads_mask_spelled_out(lab, architecture, name):
    system = lab.system(architecture)
    tokens = lab.prompt(34)
    got, masks = watched(EVICTING[name].apply(system, CONTEXT), tokens)
    # Something was dropped, and heads or layers differ in what.
    assert all(not mask[0, :, -1].all() for mask in masks.values())
    assert len({mask.numpy().tobytes() for layer in masks.values() for mask in layer[0]}) > 1
    wrong = {index: mask.roll(1, dims=1) for index, mask in masks.items()}
    expected, mistaken = (dense_with(system, tokens, one) for one in (masks, wrong))
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 2e-4 * scale
    if next(iter(masks.values())).shape[1] > 1:
        # Negative control: every head with another one's rows.
        assert (got - mistaken).abs().max() > 1e-2 * scale


class Uneven(Evict):
    """Each layer has a budget of its own, so that one mask cannot fit them all."""

    def layer(self, rule, index, layers):
        return KnormLayer(rule._replace(tokens=11 - 4 * index))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_layers_may_hold_different_numbers_of_rows(lab, name):
    system = lab.system(name)
    tokens = lab.prompt(34)
    changed = Uneven(decoding="hold", interval=2).apply(system, CONTEXT)
    got, masks = watched(changed, tokens)
    assert masks[0][0, 0, -1].sum() > masks[1][0, 0, -1].sum()
    expected = dense_with(system, tokens, masks)
    assert (got - expected).abs().max() < 2e-4 * expected.abs().max()


def dense_with(system, tokens, masks):
    spelled_out.masks = masks
    system.model.set_attn_implementation("spelled_out")
    try:
        return system.model(tokens, use_cache=False).logits
    finally:
        spelled_out.masks = {}
        system.model.set_attn_implementation(attention.NAME)


def test_a_row_of_a_batch_equals_the_row_alone(lab, method, architecture):
    # float64: a token said twice has two keys of one length, and batches round differently.
    system = method.apply(lab.system(architecture, double=True), CONTEXT)
    prompts = [lab.prompt(15, seed=seed) for seed in range(3)]
    together = lab.rows(system.generate(lab.request(torch.cat(prompts), 10)))
    assert together == [lab.rows(system.generate(lab.request(p, 10)))[0] for p in prompts]


def test_plain_generate_equals_our_loop(lab, method, architecture):
    systems = [method.apply(lab.system(architecture), CONTEXT)]
    if architecture != "gpt2":
        moved = method.model_copy(update={"positions": "contiguous"})
        systems.append(moved.apply(lab.system(architecture), CONTEXT))
    tokens = torch.cat([lab.prompt(15, seed=seed) for seed in range(2)])
    for system in systems:
        assert generated(system, tokens, 12) == lab.rows(system.generate(lab.request(tokens, 12)))


def test_plain_generate_goes_on_from_a_cache_that_has_seen_the_text(lab, method):
    system = method.apply(lab.system("llama"), CONTEXT)
    tokens = lab.prompt(20)
    cache = system.new_cache(40)
    system.step(tokens[:, :15], cache)
    logits = system.step(tokens[:, 15:], copy.deepcopy(cache))[:, -1]
    out = system.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
    )
    assert out[:, 20:].tolist() == logits.argmax(-1, keepdim=True).tolist()
    assert cache.get_seq_length() == 20


def beams(system, tokens, new):
    out = system.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=system.new_cache(64),
        max_new_tokens=new,
        do_sample=False,
        num_beams=4,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.sequences, out.sequences_scores


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_beam_scores_what_its_tokens_score_alone(lab, method, name):
    system = method.apply(lab.system(name, double=True), CONTEXT)
    tokens, new = lab.prompt(15), 8

    def alone(sequence):
        cuts = tuple(range(15, 15 + new - 1))
        logits = forced(system, sequence[None, :-1], cuts=cuts)[0, 14:].log_softmax(-1)
        return logits.gather(1, sequence[15:, None]).sum().float()

    sequences, scores = beams(system, tokens, new)
    torch.testing.assert_close(scores[0], alone(sequences[0]), rtol=1e-4, atol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        # Negative control: beams that keep each other's rows.
        patch.setattr(EvictingLayer, "reorder_cache", lambda layer, beams: None)
        sequences, scores = beams(system, tokens, new)
    assert (scores[0] - alone(sequences[0])).abs() > 1e-2


def test_a_reset_forgets_everything(lab, method):
    system = method.apply(lab.system("llama"), CONTEXT)
    tokens, cache = lab.prompt(30), system.new_cache(64)
    first = [system.step(part, cache) for part in tokens.split((20, 1, 1, 1, 7), dim=1)]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes(cache) == {}
    again = [system.step(part, cache) for part in tokens.split((20, 1, 1, 1, 7), dim=1)]
    assert all(map(torch.equal, first, again))


# Contiguous positions


def shallow(lab, name):
    """One layer with one key/value head: keys depend on tokens alone, and all heads keep the same."""
    system = lab.system(name)
    config = copy.deepcopy(system.model.config)
    config.num_hidden_layers = 1
    config.num_attention_heads = 4
    config.num_key_value_heads = 1
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    if name == "gpt_neox":  # as many key heads as query heads
        config.num_attention_heads, config.hidden_size, config.head_dim = 1, 32, 32
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    return replace(
        system,
        model=model,
        step=eager_step(model),
        new_cache=lambda capacity: new_dynamic(model.config),
    )


@pytest.mark.parametrize("cls", ["sink window", "random", "random hold", "knorm hold", "knorm"])
@pytest.mark.parametrize("name", ROTARY)
def test_contiguous_positions_are_those_of_a_text_without_the_dropped_tokens(lab, name, cls):
    dense = shallow(lab, name)
    tokens = lab.prompt(34)
    method = EVICTING[cls].model_copy(update={"positions": "contiguous"})
    for positions, equal in (("contiguous", True), ("original", False)):
        method = method.model_copy(update={"positions": positions})
        system = method.apply(dense, CONTEXT)
        cache, start, worst = system.new_cache(64), 0, 0.0
        kept = torch.arange(0)
        for end in (*CUTS, 34):
            logits = system.step(tokens[:, start:end], cache, keep=0)
            text = torch.cat((kept, torch.arange(start, end)))
            expected = dense.model(tokens[:, text], use_cache=False).logits[:, -(end - start) :]
            worst = max(worst, float((logits - expected).abs().max() / expected.abs().max()))
            # What is held now: values are not rotated, so they tell tokens apart.
            values = cache.layers[0].values[0, 0]
            whole = dense.new_cache(64)
            dense.step(tokens[:, :end], whole)
            kept = torch.cdist(values, whole.layers[0].values[0, 0]).argmin(-1)
            start = end
        assert len(kept) < 34
        assert (worst < 1e-4) if equal else (worst > 1e-2)


def test_contiguous_positions_need_rotary_ones(lab):
    for method in (Knorm(positions="contiguous"), SinkWindow(positions="contiguous")):
        with pytest.raises(Conflict, match="gpt2 has no rotary positions"):
            method.apply(lab.system("gpt2"), CONTEXT)


# Budgets


def test_kept_counts_are_those_of_kvpress():
    """Its published tests: at a compression ratio of 0.4, 23 tokens leave 13 and 28 leave 16."""
    rule = Knorm(ratio=0.4).rule()
    assert [rule.limit(prompt) for prompt in (23, 28)] == [13, 16]


def test_the_share_is_rounded_down_exactly():
    for percent in range(100):
        rule = Knorm(ratio=percent / 100).rule()
        for prompt in (1, 7, 10, 23, 256, 1000, 4096):
            exact = math.floor(prompt * (1 - Fraction(percent, 100)))
            assert rule.limit(prompt) == max(exact, 1)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_the_highest_scores_stay_in_the_order_of_the_text(ratio):
    scores = torch.rand(5, 2, 256, generator=torch.Generator().manual_seed(0))
    limit = Rule(share=1 - ratio).limit(256)
    assert limit == int(256 * (1 - ratio))
    kept = select(scores, limit)
    assert kept.shape == (5, 2, limit)
    assert (kept.diff() > 0).all()
    worst = scores.gather(2, kept).amin(-1)
    for row in range(5):
        for head in range(2):
            assert worst[row, head] == scores[row, head].sort(descending=True).values[limit - 1]


def test_sinks_and_recent_rows_are_safe():
    scores = torch.arange(20.0).sub(10).square().neg().expand(2, 3, 20)  # the ends score lowest
    kept = select(scores, 9, sink=2, recent=3)
    assert kept[1, 2].tolist() == [0, 1, 9, 10, 11, 12, 17, 18, 19] or kept[1, 2].tolist() == [
        0, 1, 8, 9, 10, 11, 17, 18, 19,
    ]  # fmt: skip
    assert select(scores, 5, sink=2, recent=3)[0, 0].tolist() == [0, 1, 17, 18, 19]


def test_take_is_a_gather_of_whole_rows():
    rows = torch.randn(2, 3, 20, 4, generator=torch.Generator().manual_seed(0))
    kept = select(torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(1)), 7)
    expected = torch.stack([
        torch.stack([rows[b, h][kept[b, h]] for h in range(3)]) for b in range(2)
    ])  # fmt: skip
    for held in (rows, rows.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(take(held, kept), expected)


def rows_held(system, lab, *, prompt=20, steps=9):
    cache, counts = system.new_cache(64), []
    system.step(lab.prompt(prompt), cache)
    for _ in range(steps):
        counts.append(cache.layers[0].keys.shape[-2])
        system.step(lab.prompt(1), cache)
    assert all(layer.get_seq_length() == prompt + steps for layer in cache.layers)
    return counts


def test_grow_keeps_what_is_decoded_and_hold_goes_back_to_the_budget(lab):
    dense = lab.system("llama")
    counted = {
        "grow": Knorm(ratio=0.5),
        "hold": Knorm(ratio=0.5, decoding="hold", interval=4),
        "each": Knorm(ratio=0.5, decoding="hold", interval=1),
        "late": Knorm(tokens=22, decoding="hold", interval=2),
    }
    counts = {name: rows_held(one.apply(dense, CONTEXT), lab) for name, one in counted.items()}
    assert counts["grow"] == [10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert counts["hold"] == [10, 11, 12, 13, 10, 11, 12, 13, 10]
    assert counts["each"] == [10] * 9
    assert counts["late"] == [20, 21, 22, 23, 22, 23, 22, 23, 22]


def test_the_bytes_are_those_of_the_rows_held(lab):
    system = Knorm(ratio=0.75).apply(lab.system("llama"), CONTEXT)
    cache = system.new_cache(64)
    system.step(lab.prompt(20), cache)
    # keys and values, 2 layers, 2 heads, 5 rows of 8 float32 numbers
    assert cache_bytes(cache) == {"keys_values": 2 * 2 * 2 * 5 * 8 * 4}


class Sinking(Evict):
    """A method with rows that are always kept."""

    def layer(self, rule, index, layers):
        raise NotImplementedError

    def rule(self, rotary=None):
        return super().rule(rotary)._replace(sink=4, recent=8)


def test_budgets_that_cannot_be():
    with pytest.raises(ValidationError, match="11 tokens is smaller than the 12 that are always"):
        Sinking(tokens=11)
    assert Sinking(tokens=12).rule().limit(100) == 12
    assert Sinking(ratio=0.99).rule().limit(100) == 12
    for name, params in (
        ("kv/knorm", {"ratio": 1.0}),
        ("kv/knorm", {"ratio": -0.1}),
        ("kv/keydiff", {"tokens": -1}),
        ("kv/random", {"interval": 0}),
        ("kv/random", {"decoding": "shrink"}),
        ("kv/sink_window", {"window": 0}),
        ("kv/sink_window", {"sink": -1}),
    ):
        with pytest.raises(SpecError, match=next(iter(params))):
            catalogue.decode(name, params)


# Refusals


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_models_without_full_attention_are_refused_before_weights_matter(lab, positions):
    config = copy.deepcopy(lab.system("gemma3_text").model.config)
    config.layer_types = ["sliding_attention"] * 3
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    system = replace(lab.system("gemma3_text"), model=model)
    for method in EVICTING.values():
        moved = method.model_copy(update={"positions": positions})
        with pytest.raises(Conflict, match="no full-attention layer"):
            moved.apply(system, CONTEXT)


def test_sliding_layers_stay_native(lab, method):
    cache = method.apply(lab.system("gemma3_text"), CONTEXT).new_cache(9)
    assert [isinstance(layer, EvictingLayer) for layer in cache.layers] == [False, True, False]


def test_the_traits_say_that_rows_are_gone(method):
    assert method.effects() == EFFECTS
    left = EFFECTS.after(frozenset(Trait))
    assert not left & {
        Trait.FULL_CONTEXT,
        Trait.ROLLBACK,
        Trait.PADDED_BATCH,
        Trait.STATIC_SHAPES,
        Trait.LOSSLESS,
        Trait.OWN_CACHE,
    }
    assert Trait.BATCH in left


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_a_padded_batch_is_refused_in_our_loop_and_in_plain_generate(lab, method, name):
    system = method.apply(lab.system(name), CONTEXT)
    tokens = torch.cat([lab.prompt(12, seed=seed) for seed in range(2)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    padded = mask.clone()
    padded[1, :3] = False
    whole = lab.rows(system.generate(lab.request(tokens, 3)))
    assert lab.rows(system.generate(lab.request(tokens, 3, mask=mask))) == whole
    with pytest.raises(RunError, match="no padded batch"):
        list(system.generate(lab.request(tokens, 3, mask=padded)))
    with pytest.raises(RunError, match="no padded batch"):
        system.model.generate(
            tokens,
            attention_mask=padded.long(),
            past_key_values=system.new_cache(20),
            max_new_tokens=3,
        )


def test_a_mask_of_the_users_own_is_refused(lab, method):
    system = method.apply(lab.system("llama"), CONTEXT)
    tokens = lab.prompt(12)
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    holed = causal.clone()
    holed[..., 5:, 2] = False
    plain = system.step(tokens, system.new_cache(12))
    assert torch.equal(system.step(tokens, system.new_cache(12), mask=causal), plain)
    for mask in (holed, torch.zeros(holed.shape).masked_fill(~holed, -1e30)):
        with pytest.raises(RunError, match="no attention mask"):
            system.step(tokens, system.new_cache(12), mask=mask)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_taking_tokens_back_is_refused_everywhere(lab, method, name):
    """transformers' assisted decoding does not ask whether a cache crops exactly: ours says so."""
    system = method.apply(lab.system(name), CONTEXT)
    tokens = lab.prompt(15)
    cache = system.new_cache(64)
    system.step(tokens, cache)
    assert not cache.is_croppable
    for n in (0, -1):
        with pytest.raises(RunError, match="cannot take tokens back"):
            cache.crop(n)
    with pytest.raises(RunError, match="does not crop exactly"):
        enable_rollback(cache)
    with pytest.raises(RunError, match="cannot take tokens back"):
        generated(system, tokens, 10, prompt_lookup_num_tokens=3)
    with pytest.raises(RunError, match="cannot take tokens back"):
        generated(system, tokens, 10, assistant_model=lab.system("llama").model)
