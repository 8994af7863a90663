"""kv/kivi: what is coded when, its bytes, its error, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compresskit.errors import Conflict, RunError, SpecError
from compresskit.hf import attention
from compresskit.hf.cache import build_cache, cache_bytes, enable_rollback
from compresskit.methods.kv._coded import CodedLayer, Form
from compresskit.methods.kv.kivi import Kivi, KiviLayer
from compresskit.traits import Trait

OURS = SimpleNamespace(_attn_implementation=attention.NAME)
SMALL = {"group": 4, "residual": 8}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def layer_of(bits=4, group=4, residual=8, **options):
    return KiviLayer(OURS, bits=bits, group=group, residual=residual, **options)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compressed(system, **options):
    return Kivi(**{**SMALL, **options}).apply(system, None)


def continuation(system, tokens, *, cuts):
    """Logits of all tokens, fed in passes that end at `cuts`."""
    cache, logits, start = system.new_cache(tokens.shape[-1]), [], 0
    for end in (*cuts, tokens.shape[-1]):
        logits.append(system.step(tokens[:, start:end], cache, keep=0))
        start = end
    return torch.cat(logits, dim=1)


def divergence(p, q):
    """Mean KL(p || q) over positions, in nats per token."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("cuts", [(), (20,), tuple(range(1, 37)), (3, 8, 16, 31)])
def test_what_is_coded_when(cuts):
    """Keys: whole residuals. Values: all but the newest `residual`. However the tokens come."""
    x, y, layer = normal(1, 2, 37, 8), normal(1, 2, 37, 8, seed=1), layer_of()
    start = 0
    for end in (*cuts, 37):
        layer.update(x[:, :, start:end], y[:, :, start:end])
        start = end
        assert layer.get_seq_length() == end
        assert layer.keys.shape[2] == end // 8 * 8
        assert layer.values.shape[2] == max(end - 8, 0)
    assert torch.equal(layer.key_tail, x[:, :, 32:])
    assert torch.equal(layer.value_tail, y[:, :, 29:])
    whole = layer_of()
    whole.update(x, y)
    for name in layer.tensors:
        assert torch.equal(getattr(layer, name), getattr(whole, name)), name


def test_codes_are_never_coded_again():
    x, layer = normal(1, 2, 40, 8), layer_of(bits=2)
    layer.update(x[:, :, :20], x[:, :, :20])
    held = {name: getattr(layer, name).clone() for name in layer.tensors if "tail" not in name}
    for token in range(20, 40):
        layer.update(x[:, :, token : token + 1], x[:, :, token : token + 1])
    for name, before in held.items():
        assert torch.equal(getattr(layer, name)[:, :, : before.shape[2]], before), name


@pytest.mark.parametrize("bits", [2, 4])
def test_the_error_is_at_most_half_a_scale_and_nothing_in_the_tail(bits):
    x = normal(2, 2, 37, 8) * torch.logspace(-2, 1, 8) + torch.arange(8)
    layer = layer_of(bits=bits)
    layer.update(x, x)
    keys, values = (x - layer.read_keys()).abs(), (x - layer.read_values()).abs()
    assert not keys[:, :, 32:].any()
    assert not values[:, :, 29:].any()
    by_channel = layer.key_scales.float().repeat_interleave(4, dim=2)
    by_token = layer.value_scales.float().repeat_interleave(4, dim=3)
    # A minimum in float16 is off by up to 2^-12 of it.
    slack = 2**-11 * x.abs()
    assert (keys[:, :, :32] <= by_channel / 2 + slack[:, :, :32]).all()
    assert (values[:, :, :29] <= by_token / 2 + slack[:, :, :29]).all()
    assert (keys > 0.1 * by_channel.mean()).any()


def test_channels_with_outliers_are_why_keys_go_by_channel():
    x = normal(1, 2, 32, 8)
    x[..., 3] += 50
    layer = layer_of(bits=2)
    layer.update(x, x.repeat(1, 1, 2, 1)[:, :, :32])
    by_token = layer.encode_values(x).dequantise()
    assert (layer.read_keys() - x).square().mean() < (by_token - x).square().mean() / 20


TOKENS = (256, 512, 1000, 1024, 4096)
PUBLISHED = {
    2: (6.25, 4.625, 4.508, 3.812, 3.203),
    4: (7.75, 6.375, 6.276, 5.688, 5.172),
}
"""Effective bits of a number at those lengths with groups of 32 and a residual of 128, computed by
hand: coded bits + 32 / group for what is coded, 16 for the tails; mean of keys and values."""


def held_bits(tokens, **options):
    """Bits a number of a cache in bfloat16, metadata and tails included."""
    width, heads = 64, 3
    cache = layer_of(**options)
    x = torch.zeros(1, heads, tokens, width, dtype=torch.bfloat16)
    cache.update(x, x)
    held = cache_bytes(SimpleNamespace(layers=[cache]))
    assert set(held) <= {"codes", "scales", "residual"}, "no slack"
    return 8 * sum(held.values()) / (2 * heads * tokens * width)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_bytes_are_those_of_the_formula(bits):
    got = [held_bits(tokens, bits=bits, group=32, residual=128) for tokens in TOKENS]
    assert got == pytest.approx(PUBLISHED[bits], abs=6e-4)


@pytest.mark.parametrize(("bits", "group", "ratio"), [(4, 64, 3.2), (2, 32, 5.0)])
def test_the_defaults_reach_their_ratio_at_4096_tokens(bits, group, ratio):
    assert 16 / held_bits(4096, bits=bits, group=group, residual=64) >= ratio


def test_a_prompt_is_seen_exactly_and_later_tokens_see_codes(lab, architecture):
    system = lab.system(architecture)
    attention.use(system.model)
    tokens = lab.prompt(40)
    dense = continuation(system, tokens, cuts=(30,))
    ours = continuation(compressed(system, bits=2), tokens, cuts=(30, *range(31, 40)))
    assert torch.equal(ours[:, :30], dense[:, :30])
    assert divergence(dense[:, 30:], ours[:, 30:]) > 1e-4
    stored = continuation(compressed(system, bits=2, prefill="stored"), tokens, cuts=(30,))
    assert divergence(dense[:, :30], stored[:, :30]) > 1e-4


def test_tokens_behind_others_are_exact_in_a_long_pass_too(lab):
    """The second prompt of a chat: the first as codes, the second as it is."""
    system = compressed(lab.system("llama", double=True), bits=2)
    cache, tokens, seen = system.new_cache(0), lab.prompt(40), []
    system.step(tokens[:, :24], cache)
    layer = cache.layers[0]
    over_rows = layer.over_rows
    layer.over_rows = lambda call: seen.append((call, over_rows(call))) or seen[-1][1]
    system.step(tokens[:, 24:], cache)
    call, rows = seen[0]
    assert torch.equal(rows.keys[:, :, 24:], call.keys)
    assert torch.equal(rows.values[:, :, 24:], call.values)
    assert torch.equal(rows.keys[:, :, :24], layer.read_keys()[:, :, :24])


def test_a_residual_of_the_whole_text_changes_nothing(lab, architecture):
    system = lab.system(architecture, double=True)
    attention.use(system.model)
    tokens, cuts = lab.prompt(40), (20, *range(21, 40))
    dense = continuation(system, tokens, cuts=cuts)
    wide = continuation(compressed(system, residual=64), tokens, cuts=cuts)
    assert (wide - dense).abs().max() < 1e-9
    narrow = continuation(compressed(system), tokens, cuts=cuts)
    assert (narrow - dense).abs().max() > 1e-3


def test_fewer_bits_cost_more_and_one_grid_for_all_the_most(lab):
    """The negative control: two bits and one scale for a whole tensor must look bad."""

    class OneGrid(CodedLayer):
        tensors = ("keys", "values")

        def __init__(self, config):
            super().__init__(config, keys=Form("int8"), values=Form("int8"))

        def store(self, keys, values):
            for name, x in (("keys", keys), ("values", values)):
                scale = (x.max() - x.min()) / 3
                self.append(**{name: ((x - x.min()) / scale).round() * scale + x.min()})

        encode_keys = encode_values = None
        __abstractmethods__ = frozenset()
        fused = False

        def read_keys(self):
            return self.keys

        def read_values(self):
            return self.values

    system = lab.system("llama")
    attention.use(system.model)
    config, tokens, cuts = system.model.config, lab.prompt(60), (30, *range(31, 60))
    dense = continuation(system, tokens, cuts=cuts)
    coarse = replace(system, new_cache=lambda n: build_cache(config, lambda i: OneGrid(config)))
    four, two = (
        divergence(dense, continuation(compressed(system, bits=bits), tokens, cuts=cuts))
        for bits in (4, 2)
    )
    control = divergence(dense, continuation(coarse, tokens, cuts=cuts))
    assert 0 < 3 * four < two < control


def test_plain_generate_gives_the_tokens_of_our_loop(lab, architecture):
    system = compressed(lab.system(architecture))
    tokens = lab.prompt(20)
    plain = system.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=system.new_cache(0),
        max_new_tokens=20,
        do_sample=False,
    )
    assert lab.rows(system.generate(lab.request(tokens, 20))) == plain[:, 20:].tolist()


def test_rows_of_a_batch_move_with_their_tails():
    x = normal(3, 2, 13, 8)
    layer = layer_of()
    layer.update(x, -x)
    keys, values = layer.read_keys(), layer.read_values()
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 5]))
    assert torch.equal(layer.read_keys(), keys[[2, 1]])
    assert torch.equal(layer.read_values(), values[[2, 1]])
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(x, -x)
    assert torch.equal(layer.read_keys(), keys)


def test_tokens_come_back_only_while_nothing_is_coded(lab):
    layer, x = layer_of(), normal(1, 2, 9, 8)
    layer.update(x[:, :, :7], x[:, :, :7])
    layer.crop(-2)
    layer.update(x[:, :, 5:6], x[:, :, 5:6])
    assert torch.equal(layer.read_keys(), x[:, :, :6])
    layer.update(x[:, :, 6:], x[:, :, 6:])
    with pytest.raises(RunError, match="kv/kivi cannot take tokens back"):
        layer.crop(-1)
    with pytest.raises(RunError, match="does not crop exactly"):
        enable_rollback(compressed(lab.system("llama")).new_cache(0))


def test_what_it_leaves_behind():
    before = frozenset(Trait)
    gone = {Trait.DENSE_CACHE, Trait.STATIC_SHAPES, Trait.LOSSLESS}
    assert before - Kivi().effects().after(before) == gone | {Trait.ROLLBACK, Trait.PADDED_BATCH}


def test_groups_that_do_not_fit_are_refused(lab):
    with pytest.raises(
        Conflict, match="groups of 16 do not divide the model's head dimension of 8"
    ):
        Kivi(group=16, residual=32).apply(lab.system("llama"), None)
    for params in ({"group": 32, "residual": 48}, {"group": 32, "residual": 16}):
        with pytest.raises(SpecError, match=f"{params['residual']} tokens is no multiple of"):
            Kivi.decode(params, where="kv/kivi")
    with pytest.raises(SpecError, match="bits"):
        Kivi.decode({"bits": 3}, where="kv/kivi")
    with pytest.raises(Conflict, match="multiple of the group of 8"):
        Kivi(residual=12).apply(lab.system("llama"), None)
