"""kv/kvquant: keys without positions, levels from text, outliers and first tokens as they are."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.kv_bare import pieces
from compresskit_kernels.native import build
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compresskit import assets
from compresskit.decode import pad
from compresskit.errors import Conflict, RunError, SpecError
from compresskit.hf.attention import Call
from compresskit.hf.cache import build_cache, cache_bytes, roll_back
from compresskit.hf.rotary import Rotary
from compresskit.method import Context
from compresskit.methods.kv import _kvquant_layer, _nonuniform
from compresskit.methods.kv._nonuniform import WatchLayer, observe, watch
from compresskit.methods.kv._unrotated import Positions
from compresskit.methods.kv.kvquant import KVQuant
from compresskit.quality.score import pair
from compresskit.traits import Trait
from compresskit.workload import calibration
from tests.unit.conftest import CONFIGS, SMALL, random_model

QUICK = {"samples": 4, "length": 24, "sensitivity": "none"}


def text(count: int, seed: int = 7) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 300, (count,), generator=generator).tolist()


CONTEXT = Context(load=None, calibration=lambda name, count: text(count), seed=0, dtype="float32")


def with_cache(system, **options):
    tokenizer = SimpleNamespace(
        encode=lambda words, *, special: [1], bos_id=None
    )  # no BOS in front
    system = replace(system, tokenizer=tokenizer)
    return KVQuant(**{**QUICK, **options}).apply(system, CONTEXT)


@torch.inference_mode()
def forced(system, tokens, *, cuts=()):
    """Logits of all tokens, fed in passes that end at `cuts`, and the cache."""
    cache, logits = system.new_cache(tokens.shape[-1]), []
    for start, end in pairwise((0, *cuts, tokens.shape[-1])):
        logits.append(system.step(tokens[:, start:end], cache, keep=0))
    return torch.cat(logits, dim=1), cache


def fresh(architecture, **options):
    """A model of this test's own: gradients cannot pass one made in inference mode."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**{**CONFIGS.get(architecture, SMALL), **options})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def stepping(lab, model):
    """A system around `model`."""

    def step(tokens, cache, *, mask=None, positions=None, keep=1):
        return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits

    return replace(lab.system("llama"), model=model, step=step)


# Positions


@torch.inference_mode()
def test_bare_keys_are_what_the_projection_gives(lab):
    system = lab.system("llama")
    outputs = []
    projection = system.model.model.layers[1].self_attn.k_proj
    hook = projection.register_forward_hook(lambda module, args, out: outputs.append(out))
    layers, _ = watch(system, lab.prompt(30))
    hook.remove()
    expected = outputs[0].view(1, 30, 2, 8).transpose(1, 2)
    positions = Positions.of(system.model)
    assert positions.off(layers[1].keys, 0) == pytest.approx(expected, abs=1e-5)
    assert positions.on(expected, 0) == pytest.approx(layers[1].keys, abs=1e-5)
    # Negative control: one position further they are others.
    assert (positions.off(layers[1].keys, 1) - expected).abs().max() > 0.1


@torch.inference_mode()
def test_every_architecture_passes_the_trial(lab, architecture):
    model = lab.system(architecture).model
    layers, _ = watch(lab.system(architecture), torch.full((1, 16), 5))
    positions = Positions.of(model)
    positions.check(model, [(layer.keys, layer.values) for layer in layers.values()])
    assert (positions.rotary is None) == (architecture == "gpt2")


@torch.inference_mode()
@pytest.mark.parametrize("wrong", ["none", "reversed", "neighbours"])
def test_a_misunderstood_rotation_fails_the_trial(lab, wrong):
    model = random_model("llama")
    layers, _ = watch(lab.system("llama"), torch.full((1, 16), 5))
    pairs = [(layer.keys, layer.values) for layer in layers.values()]
    frequencies = Rotary.of(model).frequencies
    positions = Positions(None if wrong == "none" else Rotary(-frequencies))
    if wrong == "neighbours":
        positions = Positions(Rotary(frequencies))
        order = torch.arange(8).view(2, 4).T.flatten()  # as an interleaved model has them
        pairs = [(keys[..., order], values) for keys, values in pairs]
    with pytest.raises(Conflict, match=r"kv/kvquant .* llama"):
        positions.check(model, pairs)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("cohere", {"num_key_value_heads": 2}),
    ],
)
def test_rotations_that_cannot_be_taken_off_are_refused(lab, architecture, options):
    system = stepping(lab, fresh(architecture, **options))
    with pytest.raises(Conflict, match="kv/kvquant codes keys without their positions"):
        with_cache(system)


@torch.inference_mode()
def test_a_rotation_of_which_there_is_no_trace_fails_the_trial(lab):
    """GPT-J has no module of frequencies: its keys would be taken for bare ones."""
    model = fresh("gptj", n_embd=32, n_head=4, n_layer=2, rotary_dim=4, n_positions=64)
    positions = Positions.of(model)
    assert positions.rotary is None
    layers, _ = watch(stepping(lab, model), torch.full((1, 16), 5))
    with pytest.raises(Conflict, match=r"kv/kvquant .* gptj"):
        positions.check(model, [(layer.keys, layer.values) for layer in layers.values()])


# Calibration


@pytest.mark.parametrize("side", ["key", "value"])
def test_worth_is_the_squared_slope_of_the_loss(lab, side, monkeypatch):
    """Golden: the loss with one number moved up and down."""
    model = fresh("llama").double()

    system = stepping(lab, model)
    row = torch.tensor(text(12))
    positions = Positions.of(model)
    seen = observe(
        system, row[None], positions, skip=0, fisher=True, progress=lambda done, total: None
    )
    worth = (seen[0].key_worth if side == "key" else seen[0].value_worth)[0, 1, 4]

    class Moved(WatchLayer):
        def update(self, keys, values, *rest, **options):
            moved = (keys if side == "key" else values).clone()
            moved[0, 1, 4] += self.by
            return super().update(*((moved, values) if side == "key" else (keys, moved)))

    @torch.no_grad()
    def loss(channel, by):
        layer = Moved()
        layer.by = torch.zeros(8, dtype=torch.float64)
        layer.by[channel] = by
        cache = build_cache(model.config, lambda index: layer if index == 0 else WatchLayer())
        logits = system.step(row[None], cache)
        return float(
            torch.nn.functional.cross_entropy(logits[0, :-1].float(), row[1:], reduction="sum")
        )

    slopes = torch.tensor([(loss(c, 0.05) - loss(c, -0.05)) / 0.1 for c in range(8)])
    # A rotation mixes the slopes of numbers j and j + 4; the sum of their squares stays.
    expected = slopes.square().view(2, 4).sum(0)
    assert worth.view(2, 4).sum(0) == pytest.approx(expected, rel=0.1, abs=1e-4)
    assert expected.max() > 1e-3


def test_worth_draws_the_levels(lab):
    system = stepping(lab, fresh("llama"))
    tables = [
        with_cache(system, sensitivity=kind).new_cache(9).layers[1].levels.key_table
        for kind in ("fisher", "none")
    ]
    assert not torch.equal(*tables)


def planted(seed=0, tokens=200):
    """Keys with a range and an offset for each channel, values without."""
    fixed = torch.Generator().manual_seed(9)
    scale, shift = 10 ** torch.rand(2, 1, 2, 1, 16, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 2, tokens, 16, generator=generator)
    return keys * scale + 3 * shift, values


def layer_for(keys, values, *, bits=3, outliers=0.05, sink=0, rotary=None):
    ones = torch.ones_like(keys)
    seen = _nonuniform.Seen(keys, values, ones, ones)
    config = copy.deepcopy(random_model("llama").config)
    levels = _nonuniform.fit(seen, bits, outliers)
    positions = Positions(rotary)
    config._attn_implementation = "compresskit"
    return _kvquant_layer.KVQuantLayer(
        config, levels, positions, bits=bits, outliers=outliers, sink=sink
    )


def relative(x, found):
    """Squared error over the variance of each channel."""
    return float(((x - found).square().mean(-2) / x.var(dim=-2)).mean())


def test_the_error_falls_with_every_bit_and_channels_have_their_own_range():
    calibration, (keys, values) = planted(1), planted(2)
    errors = []
    for bits in (2, 3, 4):
        layer = layer_for(*calibration, bits=bits)
        layer.update(keys, values)
        found_keys, found_values = layer.read(0, 200)
        errors.append((relative(keys, found_keys), relative(values, found_values)))
        # Each at least nearly as good as the best levels for normal numbers (Max 1960).
        assert max(errors[-1]) < 1.3 * {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]
    assert errors == sorted(errors, reverse=True)
    # Negative control: one range for all channels.
    layer = layer_for(*calibration, bits=4)
    levels = layer.levels
    one = levels.half.amax().expand_as(levels.half).contiguous()
    middle = levels.middle.mean().expand_as(levels.middle).contiguous()
    layer.levels = levels._replace(half=one, middle=middle)
    layer.update(keys, values)
    assert relative(keys, layer.read(0, 200)[0]) > 5 * errors[-1][0]


def test_outliers_come_back_as_they_were():
    calibration, (keys, values) = planted(1), planted(2)
    keys[0, 0, 50, 3], values[0, 1, 60, 7] = 1e4, -1e4
    layer = layer_for(*calibration, outliers=1 / 16)
    layer.update(keys, values)
    found_keys, found_values = layer.read(0, 200)
    assert found_keys[0, 0, 50, 3] == 1e4
    assert found_values[0, 1, 60, 7] == -1e4
    exact = (found_keys == keys).sum(-1)
    assert (exact >= 1).all()
    # And they do not widen the range of the others: what is next to one is as near as elsewhere.
    assert (found_values - values)[0, 1, 60].abs().max() < 0.6
    # Negative control: without room for them they are lost, and take their row along.
    layer = layer_for(*calibration, outliers=0)
    layer.update(keys, values)
    found_keys, found_values = layer.read(0, 200)
    assert found_keys[0, 0, 50, 3] < 1e3
    assert (found_values - values)[0, 1, 60].abs().max() > 10


def test_the_first_tokens_stay_as_they_are_however_they_arrive():
    calibration, (keys, values) = planted(1), planted(2)
    for cuts in ((200,), (3, 4, 9, 200), (5, 200), (1, 2, 3, 4, 5, 6, 200)):
        layer = layer_for(*calibration, sink=5)
        for start, stop in pairwise((0, *cuts)):
            layer.update(keys[..., start:stop, :], values[..., start:stop, :])
        assert torch.equal(layer.first_keys, keys[..., :5, :])
        assert torch.equal(layer.first_values, values[..., :5, :])
        assert layer.get_seq_length() == 200
        assert layer.keys.shape[-2] == 195


def test_the_bytes_are_those_of_the_formula():
    calibration, (keys, values) = planted(1), planted(2)
    for bits in (2, 3, 4):
        layer = layer_for(*calibration, bits=bits, outliers=0.07, sink=5)
        layer.update(keys, values)
        cache = build_cache(random_model("gpt2").config, lambda index: WatchLayer())
        cache.layers[:] = [layer]
        held = cache_bytes(cache)
        coded, heads, width, apart = 195, 2, 16, 2  # 0.07 of 16, rounded up
        assert held["codes"] == 2 * heads * coded * width * bits // 8
        assert held["scales"] == heads * coded * (2 + 2)  # bfloat16, of values alone
        assert held["residual"] == 2 * heads * (coded * apart + 5 * width) * 4  # float32
        assert held["index"] == 2 * heads * coded * apart
        assert held["tables"] == 4 * (2 * 2**bits + 2 * heads * width)
        assert set(held) == {"codes", "scales", "residual", "index", "tables"}


# In a model


@torch.inference_mode()
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_attention_by_pieces_is_attention(queries):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 37, 8, generator=generator)
    query = torch.randn(2, 6, queries, 8, generator=generator)
    mask = torch.ones(queries, 37, dtype=torch.bool).tril(37 - queries)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *(x.repeat_interleave(3, 1) for x in (keys, values)), attn_mask=mask, scale=0.5
    )
    cuts = (0, 2, 12, 36, 37)
    parts = [(keys[..., a:b, :], values[..., a:b, :]) for a, b in pairwise(cuts)]
    found = pieces.attend(query, parts, rows=37, scale=0.5)
    assert found.transpose(1, 2) == pytest.approx(expected, abs=1e-5)
    # Negative control: a row more than there is moves the diagonal.
    if queries > 1:
        moved = pieces.attend(query, parts, rows=38, scale=0.5)
        assert (moved.transpose(1, 2) - expected).abs().max() > 1e-2


@torch.inference_mode()
@pytest.mark.skipif(not build.available(), reason=build.reason())
@pytest.mark.parametrize("sink", [0, 5])
def test_where_there_are_native_kernels_they_are_what_runs_and_say_the_same(sink):
    keys, values = torch.randn(2, 1, 2, 60, 64, generator=torch.Generator().manual_seed(0))
    rotary = Rotary(10000.0 ** (-torch.arange(32) / 32))
    query = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(1))
    made, found, ran = {}, {}, {}
    call = Call(torch.nn.Module(), query, keys, values, None, 1 / 8, {})
    for impl in ("auto", "reference"):
        layer = made[impl] = layer_for(keys, values, sink=sink, rotary=rotary)
        dispatch.reset()
        with dispatch.forced(impl):
            for start, stop in ((0, 3), (3, 40), (40, 60)):
                layer.update(keys[..., start:stop, :], values[..., start:stop, :])
            found[impl] = made["auto"].attend(call)
        ran[impl] = dispatch.used()
        dispatch.reset()
        assert layer.get_seq_length() == 60
    for op in ("kv_extend", "kv_decode"):
        assert [one.partition(":")[0] for one in ran["auto"][op]] == ["native"]
        assert [one.partition(":")[0] for one in ran["reference"][op]] == ["reference"]
    assert found["auto"].shape == (1, 1, 4, 64)
    assert found["auto"] == pytest.approx(found["reference"], abs=1e-5)
    for name in ("keys", "key_places", "values", "value_places"):
        # In the middle of two levels, or equally far out, the one or the other is taken.
        one, other = (getattr(layer, name) for layer in made.values())
        assert (one == other).float().mean() > 0.99


def test_other_levels_reach_the_kernels():
    """What a layer tells them is made once, for the levels that it has."""
    calibration, (keys, values) = planted(1), planted(2)
    layer = layer_for(*calibration)
    layer.update(keys, values)
    before = layer.read(0, 200)[0]
    layer.levels = layer.levels._replace(key_table=layer.levels.key_table * 2)
    assert not torch.equal(layer.read(0, 200)[0], before)


def test_no_pieces_are_refused():
    with pytest.raises(ValueError, match="no pieces"):
        pieces.attend(torch.ones(1, 1, 1, 8), [], rows=0, scale=1.0)


def test_with_everything_kept_it_is_the_dense_cache(lab, architecture):
    """Sinks for the whole text: positions taken off and put on nowhere, no code anywhere."""
    system = lab.system(architecture)
    tokens = lab.prompt(20)
    dense, _ = forced(system, tokens, cuts=(15, 16))
    found, _ = forced(with_cache(system, sink=20), tokens, cuts=(15, 16))
    assert (found - dense).abs().max() < 1e-4 * dense.abs().max()


def test_it_is_near_the_dense_cache_on_every_architecture(lab, architecture):
    system = lab.system(architecture)
    tokens = torch.tensor([text(24)])  # of the calibration text: the levels know it
    dense, _ = forced(system, tokens, cuts=(18, 19))

    def error(**options):
        found, _ = forced(with_cache(system, **options), tokens, cuts=(18, 19))
        return (found - dense).abs().mean() / dense.abs().mean()

    # Nearly half of the numbers apart leaves little to lose; what is read is in the right place.
    assert error(bits=4, outliers=0.49) < 0.12
    assert error(bits=2, outliers=0, sink=0) > error(bits=4, outliers=0.49)


@pytest.mark.parametrize("cuts", [(), (3, 9, 10, 31), tuple(range(20, 40))])
def test_the_cut_into_passes_makes_no_difference(lab, cuts, monkeypatch):
    system = with_cache(lab.system("llama"))
    tokens = lab.prompt(40)
    expected, _ = forced(system, tokens, cuts=(25,))
    monkeypatch.setattr(_kvquant_layer, "STRETCH", 7)
    found, _ = forced(system, tokens, cuts=cuts)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("back", [1, 20, 26, 30])
def test_tokens_taken_back_leave_no_trace(lab, back):
    """Also where the first tokens themselves are taken back."""
    system = with_cache(lab.system("llama"))
    tokens, other = lab.prompt(30), lab.prompt(30, seed=9)
    _, straight = forced(system, tokens)
    detour = system.new_cache(60)
    with torch.inference_mode():
        system.step(torch.cat((tokens[:, : 30 - back], other[:, :back]), 1), detour)
        roll_back(detour, back)
        assert detour.get_seq_length() == 30 - back
        system.step(tokens[:, 30 - back :], detour)
    for one, again in zip(straight.layers, detour.layers, strict=True):
        for name in one.tensors:
            mine, theirs = getattr(one, name).float(), getattr(again, name).float()
            assert mine == pytest.approx(theirs, abs=1e-4)


def test_rows_of_a_batch_know_nothing_of_each_other(lab, architecture):
    system = with_cache(lab.system(architecture))
    prompts = [lab.prompt(20, seed=seed) for seed in range(3)]
    together, _ = forced(system, torch.cat(prompts), cuts=(18,))
    for row, prompt in zip(together, prompts, strict=True):
        alone, _ = forced(system, prompt, cuts=(18,))
        assert (row - alone[0]).abs().mean() < 1e-3 * alone.abs().mean()


def test_plain_generate_says_what_our_loop_says(lab, architecture):
    system = with_cache(lab.system(architecture))
    tokens = lab.prompt(20)
    ours = lab.rows(system.generate(lab.request(tokens, 12)))[0]
    with torch.inference_mode():
        theirs = system.model.generate(
            tokens, past_key_values=system.new_cache(32), max_new_tokens=12, do_sample=False
        )
    assert theirs[0, 20:].tolist() == ours


def test_a_padded_batch_is_refused(lab):
    system = with_cache(lab.system("llama"))
    tokens, mask = pad([text(3), text(9)], device=torch.device("cpu"))
    with pytest.raises(RunError, match="kv/kvquant takes no padded batch"):
        next(system.generate(lab.request(tokens, 4, mask=mask)))
    assert Trait.PADDED_BATCH not in KVQuant().effects().after(frozenset(Trait))


def test_gradients_need_float_weights():
    assert Trait.FLOAT_WEIGHTS in KVQuant().effects().requires
    assert Trait.FLOAT_WEIGHTS not in KVQuant(sensitivity="none").effects().requires
    assert Trait.ROLLBACK in KVQuant().effects().after(frozenset(Trait))


@pytest.mark.parametrize("options", [{"length": 300}, {"length": 6, "sink": 5}])
def test_rows_of_text_that_cannot_be_are_refused(lab, options):
    with pytest.raises(SpecError, match="length: rows of"):
        with_cache(lab.system("llama"), **options)


def test_heads_that_do_not_fill_bytes_are_refused(lab):
    system = stepping(lab, fresh("llama", head_dim=12))
    with pytest.raises(Conflict, match="12 is no multiple of 8"):
        with_cache(system)


def test_on_a_trained_model_the_divergence_falls_with_bits(open_stack):
    words = assets.text_path("heldout").read_text(encoding="utf-8")
    with open_stack() as opened:
        system = opened.system
        context = replace(CONTEXT, calibration=partial(calibration, system.tokenizer))
        ids = torch.tensor(system.tokenizer.encode(words)[: 16 * 81]).view(16, 81)

        def predictions(changed):
            return forced(changed, ids[:, :-1], cuts=(64, 72))[0][:, 64:]

        full = predictions(system)

        def kl(**options):
            changed = KVQuant(samples=1, length=256, **options).apply(system, context)
            return float(pair(predictions(changed), full, ids[:, 65:]).kl.mean())

        two, three, four = (kl(bits=bits) for bits in (2, 3, 4))
        # Must be worse: without what is kept apart, and without knowing which numbers matter.
        bare, blind = kl(bits=2, outliers=0.0, sink=0), kl(bits=2, sensitivity="none")
    assert four < 0.4 * three
    assert three < 0.4 * two
    assert two < blind
    assert two < 0.7 * bare
