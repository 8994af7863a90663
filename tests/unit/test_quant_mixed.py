"""Widths by layer: overrides, the measured sensitivities, the knapsack, and quant/mixed."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from compresskit import catalogue, workload
from compresskit.device import resolve as device
from compresskit.errors import SpecError
from compresskit.hf import modules
from compresskit.method import quiet
from compresskit.methods.quant import _budget, _divergence, _overrides, _parts
from compresskit.methods.quant._group import quantise
from compresskit.methods.quant.int4 import Int4
from compresskit.methods.quant.intn import IntN
from compresskit.methods.quant.mixed import Mixed
from compresskit.system import System

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def llama(*, tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    options = {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    config = LlamaConfig(**SIZES, **options, initializer_range=0.25)
    return LlamaForCausalLM(config).to(dtype).eval()


def mixtral():
    torch.manual_seed(0)
    options = {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **options, initializer_range=0.25)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.25)).eval()


MODELS = {
    "tied": llama,
    "untied": lambda: llama(tied=False),
    "bfloat16": lambda: llama(dtype=torch.bfloat16),
    "gpt2": gpt2,
    "mixtral": mixtral,
}


def system(model):
    tokenizer = SimpleNamespace(bos_id=None, encode=lambda text, special=True: [1])
    nothing = dict.fromkeys(("step", "new_cache", "decode"))
    return System(model=model, tokenizer=tokenizer, device=device("cpu"), context=64, **nothing)


def calibration(text, count):
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(5)).tolist()


CONTEXT = SimpleNamespace(calibration=calibration, progress=quiet)


def mixed(**options):
    return Mixed.decode(
        {"samples": 2, "length": 16, "group": 32, "choices": [2, 4, 8], **options}, where="test"
    )


def bits_by_layer(model):
    """Bits of codes of every packed layer, from the bytes that it holds."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "product") and hasattr(module, "in_features"):
            size = module.in_features * module.out_features
            held = module.product.held_bytes()
            codes = next(value for role, value in held.items() if role in ("packed", "codes"))
            found[name] = round(8 * codes / size)
    return found


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in before.items()
    )


# Overrides


def test_bits_follow_the_name_and_the_first_match_wins():
    model = llama()
    layers = ("*.0.mlp.down_proj=8", "*.down_proj=2", "*.o_proj=dense")
    IntN(bits=4, group=32, layers=layers).apply(system(model), CONTEXT)
    bits = bits_by_layer(model)
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.1.mlp.down_proj"] == 2
    assert bits["model.layers.1.mlp.up_proj"] == 4
    left = [site.name for site in modules.linears(model)]
    assert left == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]


def test_overrides_are_written_on_the_command_line_and_in_files():
    spec = catalogue.parse_method('quant/int4:layers=["*.down_proj=8","lm_head=dense"]')
    assert spec.params["layers"] == ["*.down_proj=8", "lm_head=dense"]
    assert catalogue.parse_method(spec.label()) == spec


@pytest.mark.parametrize("text", ["*.down_proj", "*.down_proj=9", "=8", "*.down_proj=fp8"])
def test_what_is_no_override_is_refused_when_it_is_written(text):
    with pytest.raises(SpecError, match="no override: write PATTERN=BITS"):
        catalogue.decode("quant/int4", {"layers": [text]})


def test_an_override_that_decides_nothing_is_an_error():
    with pytest.raises(SpecError, match=r"'\*\.dwon_proj' matches no layer.*q_proj"):
        Int4(layers=("*.dwon_proj=8",)).apply(system(llama()), CONTEXT)
    with pytest.raises(SpecError, match="put the particular ones first"):
        Int4(layers=("*=8", "*.down_proj=2")).apply(system(llama()), CONTEXT)
    with pytest.raises(SpecError, match="matches no layer that would be quantised"):
        Int4(head=False, layers=("lm_head=8",)).apply(system(llama()), CONTEXT)


def test_experts_take_overrides_by_parameter_and_stay_dense_as_a_whole():
    model = mixtral()
    IntN(bits=4, layers=("*.experts.down_proj=8",), group=32).apply(system(model), CONTEXT)
    bits = bits_by_layer(model)
    assert {bits[name] for name in bits if ".second." in name} == {8}
    assert {bits[name] for name in bits if ".first." in name} == {4}
    model = mixtral()
    found = IntN(layers=("*.experts.*=dense",), group=32).apply(system(model), CONTEXT)
    assert "experts" in found.facts["left_dense"]
    with pytest.raises(SpecError, match="packed as a whole"):
        IntN(layers=("*.experts.down_proj=dense",)).apply(system(mixtral()), CONTEXT)


# Parts and their rounding


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("precision", ["float32", "model"])
def test_the_model_is_bit_identical_after_the_search(make, precision):
    model = make()
    before = state_of(model)
    parameters = [id(p) for p in model.parameters()]
    mixed(precision=precision, embeddings=True).search(system(model), CONTEXT)
    assert same(model, before)
    assert [id(p) for p in model.parameters()] == parameters
    assert all("forward" not in vars(module) for module in model.modules())
    before[next(iter(before))].flatten()[0] += 1  # negative control: the comparison sees one number
    assert not same(model, before)


def test_the_model_is_restored_even_if_the_measurement_dies():
    model = llama()
    before = state_of(model)
    weights = _parts.weights_of(model, with_head=True, with_embeddings=False, skip=())

    def fail(weight):
        if weight is weights[3]:
            raise RuntimeError
        return torch.nn.Parameter(torch.zeros_like(weight.parameter()), requires_grad=False)

    with pytest.raises(RuntimeError), _parts.replaced(weights, fail):
        pass
    assert same(model, before)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_rounded_part_is_what_packing_gives_and_takes_the_bits_it_says(make, bits):
    model = make()
    rounding = _parts.Rounding(32, symmetric=False)
    for weight in _parts.weights_of(model, with_head=True, with_embeddings=True, skip=()):
        parameter = weight.parameter()
        stored = quantise(weight.rows().float(), bits=bits, group=32)
        rounded = rounding.rounded(weight, bits)
        assert rounded.shape == parameter.shape
        weight.put(rounded)
        wanted = stored.dequantise().to(parameter.dtype)
        torch.testing.assert_close(weight.rows(), wanted, rtol=0.01, atol=1e-6)
        assert rounding.stored_bits(weight, bits) == 8 * sum(
            tensor.nbytes for tensor in stored.tensors().values()
        )


def test_a_tied_head_is_rounded_without_the_embedding_unless_both_are_packed():
    model = llama()
    table = model.get_input_embeddings().weight
    for both in (False, True):
        head = _parts.weights_of(model, with_head=True, with_embeddings=both, skip=())[-1]
        assert head.name == "lm_head"
        with _parts.replaced([head], lambda w: _parts.Rounding(32, False).rounded(w, 2)):
            assert (model.get_input_embeddings().weight is table) is not both
            assert model.lm_head.weight is not table
        assert model.lm_head.weight is table


# Divergence


def test_the_divergence_is_that_of_the_definition():
    torch.manual_seed(1)
    p, q = torch.randn(2, 5, 11).double(), torch.randn(2, 5, 11).double()
    a, b = p.softmax(-1), q.softmax(-1)
    wanted = float((a * (a.log() - b.log())).sum(-1).mean())
    assert _divergence.mean_kl(p.float(), q.float()) == pytest.approx(wanted, rel=1e-5)
    assert _divergence.mean_kl(p.float(), p.float()) == 0


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_skipping_blocks_changes_no_sensitivity(make):
    model = make()
    tokens = torch.tensor(calibration("", 32)).view(2, 16)
    dense = _divergence.Dense(model, tokens)
    assert len(dense.blocks) == 2
    weight = _parts.weights_of(model, with_head=True, with_embeddings=False, skip=())[5]
    assert _divergence.block_of(model, weight.holders[0][0]) <= 1
    for each in _parts.weights_of(model, with_head=True, with_embeddings=False, skip=()):
        first = _divergence.block_of(model, each.holders[0][0])
        with _parts.replaced([each], lambda w: _parts.Rounding(32, False).rounded(w, 3)):
            assert dense.kl(first) == dense.kl(0) > 0


@torch.no_grad()
def test_blocks_that_cannot_be_skipped_are_not():
    model = llama()
    first = model.model.layers[0]
    original = first.forward

    class Odd(torch.nn.Module):
        """What a block gives depends on how often it was called."""

        def __init__(self):
            super().__init__()
            self.calls = 0
            self.self_attn, self.mlp = first.self_attn, first.mlp

        def forward(self, hidden, **kwargs):
            self.calls += 1
            return original(hidden, **kwargs) + 1e-2 * self.calls

    model.model.layers[0] = Odd()
    model.model.norm.register_forward_hook(
        lambda module, given, out: out * (1 + model.model.layers[0].calls)
    )
    dense = _divergence.Dense(model, torch.tensor([[1, 2, 3, 4]]))
    assert dense.blocks  # the odd block is handed on as it was: nothing to see
    model.model.norm.register_forward_hook(lambda module, given, out: out + torch.rand(1))
    assert _divergence.Dense(model, torch.tensor([[1, 2, 3, 4]])).blocks == []


def test_batches_bound_what_is_held(monkeypatch):
    model = llama()
    rows = torch.tensor(calibration("", 64)).view(4, 16)
    whole = mixed(samples=4).search(system(model), CONTEXT).table
    monkeypatch.setattr(_divergence, "LARGEST_HELD", 16 * 96 * 4)
    assert [len(piece) for piece in _divergence.batches(system(model), rows)] == [1, 1, 1, 1]
    pieces = mixed(samples=4).search(system(model), CONTEXT).table
    for one, other in zip(whole.entries, pieces.entries, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-3)


# The knapsack


def parts_at_random(seed, count=5):
    rng = random.Random(seed)
    parts = []
    for index in range(count):
        size = rng.choice([64, 96, 160]) * rng.randint(1, 9)
        losses = sorted((rng.random() ** 3 for _ in range(4)), reverse=True)
        options = (
            _budget.Option(bits, size * bits, loss)
            for bits, loss in zip((2, 3, 4, 8), losses, strict=True)
        )
        parts.append(_budget.Part(f"part{index}", tuple(options)))
    return parts


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed):
    parts = parts_at_random(seed)
    least = sum(part.options[0].cost for part in parts)
    most = sum(part.options[-1].cost for part in parts)
    budget = least + (most - least) * (seed + 1) // 13
    found = _budget.choose(parts, budget)
    every = (
        (sum(o.loss for o in options), sum(o.cost for o in options))
        for options in itertools.product(*(part.options for part in parts))
    )
    best = min(loss for loss, cost in every if cost <= budget)
    assert found.loss == pytest.approx(best, rel=1e-12)
    assert found.cost <= budget
    assert found == _budget.choose(parts, budget)


def test_a_coarse_budget_stays_within_it_and_near_the_best(monkeypatch):
    parts = parts_at_random(3)
    budget = 4 * sum(part.options[0].cost for part in parts) // 2
    best = _budget.choose(parts, budget)
    monkeypatch.setattr(_budget, "CELLS", 200)
    coarse = _budget.choose(parts, budget)
    assert coarse.cost <= budget
    assert best.loss <= coarse.loss <= 1.3 * best.loss


def test_a_budget_below_the_narrowest_is_refused_and_a_wide_one_takes_the_widest():
    parts = parts_at_random(0)
    least = sum(part.options[0].cost for part in parts)
    assert set(_budget.choose(parts, least).bits.values()) == {2}
    assert set(_budget.choose(parts, 10 * least).bits.values()) == {8}
    with pytest.raises(SpecError, match="Raise the budget"):
        _budget.choose(parts, least - 1)


def test_noise_that_rises_with_the_width_buys_no_bits():
    options = (
        _budget.Option(4, 400, 0.2),
        _budget.Option(6, 600, 0.1),
        _budget.Option(8, 800, 0.1001),
    )
    assert _budget.choose([_budget.Part("a", options)], 10_000).bits == {"a": 6}


# quant/mixed


def test_the_result_keeps_the_budget_and_tells_what_it_did():
    model = llama()
    method = mixed(budget=4.6)
    found = method.apply(system(model), CONTEXT)
    facts = found.facts
    assert 3.5 < facts["mixed_reached_bits"] <= 4.6
    assert (
        sum(row["parameters"] for row in facts["mixed_sensitivity"])
        == (facts["quantized_parameters"])
    )
    assert facts["mixed_predicted_kl_nats"] == pytest.approx(
        sum(row["kl_nats"][str(row["bits"])] for row in facts["mixed_sensitivity"])
    )
    assert 0.2 < facts["mixed_measured_kl_nats"] / facts["mixed_predicted_kl_nats"] < 5
    bits = bits_by_layer(model)
    for row in facts["mixed_sensitivity"]:
        members = [
            name for name in bits if name == row["part"] or name.startswith(row["part"] + ".")
        ]
        assert len(members) == row["layers"]
        assert {bits[name] for name in members} == {row["bits"]}


@pytest.mark.parametrize("granularity", ["layer", "part", "block", "kind"])
@pytest.mark.parametrize("make", [llama, mixtral], ids=["llama", "mixtral"])
def test_the_suggested_overrides_pack_the_same_widths(make, granularity):
    model = make()
    twin = copy.deepcopy(model)
    facts = mixed(budget=4.6, granularity=granularity).apply(system(model), CONTEXT).facts
    catalogue.decode("quant/intn", facts["mixed_as_intn"]).apply(system(twin), CONTEXT)
    assert bits_by_layer(twin) == bits_by_layer(model)
    assert len(set(bits_by_layer(model).values())) > 1


@torch.no_grad()
def fragile(name):
    """A model in which rounding one layer does far more harm than rounding any other."""
    model = llama(tied=False)
    layer = model.get_submodule(name)
    generator = torch.Generator().manual_seed(2)
    # One large weight a group sets the step; the small ones, which carry the signal, vanish in it.
    outliers = torch.zeros_like(layer.weight)
    outliers[:, ::32] = 40.0
    layer.weight.add_(outliers)
    layer.register_forward_hook(lambda module, given, out: out - given[0] @ outliers.t())
    layer.weight.add_(0.2 * torch.randn(layer.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"])
def test_a_planted_fragile_layer_stays_wide(name):
    found = mixed(budget=4.2, granularity="layer").search(system(fragile(name)), CONTEXT)
    assert found.widths[name] == 8
    others = [bits for other, bits in found.widths.items() if other != name]
    assert sum(bits == 8 for bits in others) < len(others) / 2
    plain = mixed(budget=4.2, granularity="layer").search(system(llama(tied=False)), CONTEXT)
    sensitive = {e.part: e.kl[4] for e in found.table.entries}
    before = {e.part: e.kl[4] for e in plain.table.entries}
    assert max(sensitive, key=sensitive.get) == name != max(before, key=before.get)


@torch.no_grad()
def cost_of(model, widths, rows, group=32):
    """Measured divergence of all weights rounded to `widths`."""
    dense = _divergence.Dense(model, rows)
    weights = _parts.weights_of(model, with_head=True, with_embeddings=False, skip=())
    rounding = _parts.Rounding(group, symmetric=False)
    with _parts.replaced(weights, lambda w: rounding.rounded(w, widths[w.name])):
        return dense.kl()


def with_losses(table, losses):
    """The table with other losses for its parts."""
    entries = tuple(replace(e, kl=kl) for e, kl in zip(table.entries, losses, strict=True))
    return replace(table, entries=entries)


def test_a_shuffled_table_chooses_worse_widths_at_equal_bits():
    """Negative control: the choice owes its quality to the measurement."""
    model = fragile("model.layers.0.mlp.up_proj")
    method = mixed(budget=4.2, granularity="layer")
    found = method.search(system(model), CONTEXT)
    rng = random.Random(0)
    real = cost_of(model, found.widths, found.rows)
    shuffled = []
    for _ in range(3):
        tables = [entry.kl for entry in found.table.entries]
        rng.shuffle(tables)
        wrong = with_losses(found.table, tables).choose(method.budget)
        assert wrong.cost / found.table.parameters <= method.budget
        shuffled.append(cost_of(model, wrong.bits, found.rows))
    assert real < min(shuffled)


@torch.no_grad()
def test_on_the_trained_model_the_choice_beats_one_width_and_a_shuffled_table(open_stack):
    """On text that nothing was measured on, at equal bits."""
    with open_stack() as opened:
        dense = opened.system

        def text(source, count):
            return workload.calibration(dense.tokenizer, source, count)

        context = SimpleNamespace(calibration=text, progress=quiet)
        found = mixed(budget=4.5, group=64, choices=[3, 4, 6]).search(dense, context)
        fresh = torch.tensor(text("calibration", 2048)[1024:]).view(8, 128)

        def cost(widths):
            return cost_of(dense.model, widths, fresh, group=64)

        uniform = cost(dict.fromkeys(found.widths, 4))
        tables = [entry.kl for entry in found.table.entries]
        random.Random(0).shuffle(tables)
        wrong = with_losses(found.table, tables).choose(4.5)
        shuffled = {name: wrong.bits[e.part] for e in found.table.entries for name in e.members}
        assert cost(found.widths) < 0.9 * min(uniform, cost(shuffled))


def test_bad_input_is_refused():
    with pytest.raises(SpecError, match="text that quality is measured on"):
        mixed(text="embedded").search(system(llama()), CONTEXT)
    with pytest.raises(SpecError, match="shares its weight with the output head"):
        mixed(head=False, embeddings=True).search(system(llama()), CONTEXT)
    with pytest.raises(SpecError, match="65 tokens a row are more"):
        mixed(length=65).search(system(llama()), CONTEXT)
    with pytest.raises(SpecError, match="each width once"):
        mixed(choices=[4, 2])
    with pytest.raises(SpecError, match=r"budget: 2\.5 bits are asked for.*takes 3"):
        mixed(budget=2.5).search(system(llama()), CONTEXT)
    with pytest.raises(SpecError, match="skip: 'nothing' matches no linear layer"):
        mixed(skip=["nothing"]).search(system(llama()), CONTEXT)


def test_names_are_tried_where_patterns_do_not_single_weights_out():
    widths = {"a.0.w": 4, "a.0.b.w": 8, "a.1.w": 4, "a.1.b.w": 8, "c": 4}
    common, layers = _overrides.suggest(widths, {"a.*.w": 4, "a.*.b.w": 8, "c": 4})
    assert (common, layers) == (4, ("a.*.b.w=8",))
    common, layers = _overrides.suggest({**widths, "d": 8, "e": 8}, {"a.*.w": 4, "a.*.b.w": 8})
    assert (common, layers) == (8, ("a.0.w=4", "a.1.w=4", "c=4"))
