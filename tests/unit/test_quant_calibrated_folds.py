"""Scales move from activations into weights without changing what a dense model computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compresskit.hf import blocks, modules, tiny
from compresskit.methods.quant._fold import Bench, Fold
from compresskit.methods.quant._linear import PackedLinear
from compresskit.methods.quant._moments import Collector, Moments
from compresskit.methods.quant._smooth import Scaled, _Smoothing

TOKENS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
# How many sets of layers of one block can take their scale from a norm, and how many from a layer.
# Fused or grouped heads stand between values and the output projection; GPT-2 and NeoX have a
# nonlinearity before the last layer; OLMo 2 puts its norms behind the layers; the experts of the
# mixtures share their norm, and are no layers themselves.
FOLDS = {
    "gemma3": (2, 1),
    "gpt2": (2, 0),
    "gpt_neox": (2, 0),
    "llama": (2, 1),
    "mixtral": (1, 0),
    "olmo2": (0, 1),
    "qwen2": (2, 1),
    "qwen3": (2, 1),
    "qwen3_moe": (1, 0),
}


def watched(model, index=0):
    """The layers of one block by input, and a bench to try folds on it."""
    stream = blocks.Stream(model, [TOKENS])
    block = stream.blocks[index]
    inside = [s for s in modules.linears(model) if s.name.startswith(f"{block.name}.")]
    collector = Collector(inside, products=True, keep=4)
    collector.over(block.module, lambda: stream.run(index, 0))
    return collector.result(), Bench(block.module, stream.samples[index], seed=0), inside


def site(sites, name):
    return next(one for one in sites if one.name.endswith(name))


@torch.no_grad()
def fold_all(model, index):
    """Fold random scales wherever that holds, in the dense model itself."""
    seen, bench, inside = watched(model, index)
    kinds = []
    folds = [bench.fold(one, inside) for one in seen]
    for place, (one, fold) in enumerate(zip(seen, folds, strict=True)):
        if fold is None:
            continue
        kinds.append("rows" if fold.kind == "rows" else "norm")
        width = one.moments.absolute.numel()
        scale = torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(place)))
        if fold.kind == "rows":
            producer = next(s for s in inside if s.module is fold.producer)
            producer.weight().div_(scale.unsqueeze(1))
            if producer.bias() is not None:
                producer.bias().div_(scale)
        else:
            scale = fold.divide(scale)
        for consumer in one.sites:
            consumer.weight().mul_(scale)
    return kinds.count("norm"), kinds.count("rows")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_folding_leaves_the_dense_model_as_it_was(architecture):
    model = tiny.random_model(architecture)
    want = model(TOKENS, use_cache=False).logits
    assert fold_all(model, 0) == FOLDS[architecture]
    assert fold_all(model, 1) == FOLDS[architecture]
    torch.testing.assert_close(model(TOKENS, use_cache=False).logits, want, rtol=1e-3, atol=1e-3)


def test_values_take_the_scale_of_the_output_projection_without_grouped_heads():
    model = tiny.random_model("llama", num_key_value_heads=4)
    seen, bench, inside = watched(model)
    output = next(one for one in seen if one.sites[0].name.endswith("o_proj"))
    fold = bench.fold(output, inside)
    assert fold is not None
    assert fold.producer is model.model.layers[0].self_attn.v_proj


@pytest.mark.parametrize(
    ("producer", "kind", "consumers", "holds"),
    [
        ("mlp.up_proj", "rows", ["mlp.down_proj"], True),
        ("mlp.gate_proj", "rows", ["mlp.down_proj"], False),  # behind a nonlinearity
        ("input_layernorm", "gain", ["q_proj", "k_proj", "v_proj"], True),
        ("input_layernorm", "gain", ["q_proj", "k_proj"], False),  # a consumer forgotten
        ("input_layernorm", "one_plus_gain", ["q_proj", "k_proj", "v_proj"], False),
        ("post_attention_layernorm", "gain", ["q_proj", "k_proj", "v_proj"], False),
    ],
)
def test_a_wrong_fold_is_noticed(producer, kind, consumers, holds):
    """Negative controls beside the right folds of the same block."""
    model = tiny.random_model("llama")
    _, bench, inside = watched(model)
    fold = Fold(model.model.layers[0].get_submodule(producer), kind)
    assert bench.holds(fold, [site(inside, name) for name in consumers]) == holds


def test_a_gain_stored_as_its_distance_from_one_is_told_apart():
    model = tiny.random_model("gemma3")
    seen, bench, inside = watched(model)
    first = seen[0]
    norm = model.model.layers[0].input_layernorm
    assert first.producers == [norm]
    assert bench.fold(first, inside) == Fold(norm, "one_plus_gain")


def test_a_norm_that_routed_experts_read_too_is_left_alone():
    model = tiny.random_model("mixtral")
    layer = model.model.layers[0]
    # A linear layer of its own beside the experts, behind the same norm.
    layer.mlp.extra = nn.Linear(64, 64, bias=False)
    routed = layer.mlp.forward
    layer.mlp.forward = lambda x: routed(x) + layer.mlp.extra(x)
    seen, bench, inside = watched(model)
    extra = next(one for one in seen if one.sites[0].name.endswith("extra"))
    assert extra.producers == [layer.post_attention_layernorm]
    assert bench.fold(extra, inside) is None


@pytest.mark.parametrize("kind", ["gain", "one_plus_gain"])
def test_rounding_of_a_folded_gain_moves_the_scale_not_the_product(kind):
    one = 1.0 if kind == "one_plus_gain" else 0.0
    norm = nn.LayerNorm(64, dtype=torch.bfloat16)
    norm.weight.data = (torch.rand(64) + 0.5 - one).bfloat16()
    norm.weight.data[3] = -one
    norm.bias.data = torch.randn(64).bfloat16()
    gain, bias = norm.weight.float() + one, norm.bias.float()
    wanted = torch.rand(64) * 3 + 0.1
    came_out = Fold(norm, kind).divide(wanted)
    torch.testing.assert_close((norm.weight.float() + one) * came_out, gain)
    torch.testing.assert_close(norm.bias.float() * came_out, bias, rtol=5e-3, atol=0)
    assert came_out[3] == 1.0
    torch.testing.assert_close(came_out[came_out != 1], wanted[came_out != 1], rtol=0.05, atol=0.05)


@torch.no_grad()
def test_layers_are_grouped_by_the_tensor_that_they_read():
    seen, _, _ = watched(tiny.random_model("llama"))
    names = [[one.name.rpartition(".")[2] for one in shared.sites] for shared in seen]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"],
                     ["down_proj"]]  # fmt: skip
    assert all(shared.moments.count == TOKENS.numel() for shared in seen)


def test_moments_are_those_of_the_inputs():
    x = torch.randn(3, 5, 8, dtype=torch.bfloat16)
    moments = Moments.empty(8, torch.device("cpu"), products=True)
    moments.add(x[:1], keep=2)
    moments.add(x[1:], keep=2)
    flat = x.reshape(-1, 8).float()
    torch.testing.assert_close(moments.hessian(), flat.T @ flat / 15)
    torch.testing.assert_close(moments.mean(), flat.abs().mean(dim=0))
    assert torch.equal(moments.largest, flat.abs().amax(dim=0))
    assert moments.tokens.shape == (4, 8)
    weight = torch.randn(6, 8)
    direct = (flat @ weight.T).square().sum() / 15
    assert moments.error(weight) == pytest.approx(float(direct), rel=1e-4)


def test_layers_that_part_ways_are_counted_one_by_one():
    """Both read the first batch, only one the second: their statistics must differ."""
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    parent = nn.Module()
    sites = [modules.Site("one", one, parent, "one"), modules.Site("other", other, parent, "other")]
    collector = Collector(sites, products=True, keep=0)
    first, second = torch.randn(3, 4), torch.randn(2, 4)
    collector.over(parent, lambda: (one(first), other(first)))
    collector.over(parent, lambda: one(second))
    found = {shared.sites[0].name: shared for shared in collector.result()}
    assert {name: shared.moments.count for name, shared in found.items()} == {"one": 5, "other": 3}
    both = torch.cat([first, second])
    torch.testing.assert_close(found["one"].moments.hessian(), both.T @ both / 5)


def test_the_difference_is_told_in_terms_of_the_dense_weight():
    weight, scale, divisor = torch.randn(3, 4), torch.rand(4) + 0.5, torch.rand(3) + 0.5
    target = Scaled(weight, scale, divisor)
    torch.testing.assert_close(target.exact, weight * scale / divisor[:, None])
    moved = (weight + 1) * scale / divisor[:, None]
    torch.testing.assert_close(target.difference(moved), torch.ones(3, 4))


def test_a_scale_applied_at_run_time_is_rounded_to_the_type_of_the_model_first():
    one = SimpleNamespace(weight=lambda: torch.zeros(1, 4, dtype=torch.bfloat16))
    scale = torch.tensor([0.3, 1.0, 2.0, 7.7])
    effective, inverse = _Smoothing.at_run_time(scale, one)
    assert inverse.dtype is torch.bfloat16
    torch.testing.assert_close(effective * inverse.float(), torch.ones(4))
    torch.testing.assert_close(effective, scale, rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", ["quant/awq", "quant/smoothquant"])
@pytest.mark.parametrize("fold_only", [True, False])
def test_fold_only_leaves_nothing_to_do_at_run_time(open_stack, name, fold_only):
    options = f"samples=4,length=64,fold_only={str(fold_only).lower()}"
    with open_stack(f"{name}:{options}") as opened:
        layers = [m for m in opened.system.model.modules() if isinstance(m, PackedLinear)]
        scaled = sum(layer.input_scale is not None for layer in layers)
        folded = opened.system.facts["scales_folded_into"]
    assert (scaled == 0) is fold_only, "the tiny model's grouped heads cannot be folded into"
    assert folded["norm"] > 0
