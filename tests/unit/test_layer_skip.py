"""speculative/layer_skip and the view of a model with fewer blocks that it drafts with."""

from __future__ import annotations

import copy

import pytest
import torch
from compresskit_kernels import dispatch
from transformers import AutoModelForCausalLM

from compresskit.decode import pad
from compresskit.errors import Conflict, SpecError
from compresskit.hf import blocks
from compresskit.hf.view import keeping
from compresskit.method import Context
from compresskit.methods.speculative.layer_skip import LayerSkip, spread, viewed
from compresskit.spec import SamplingSpec


def applied(system, **options):
    context = Context(load=None, calibration=None, seed=0, dtype="float32")
    system = LayerSkip(**options).apply(system, context)
    (settle,) = system.settle
    return settle(system)


def outer_layers(model):
    """All but the second one."""
    return [index for index in range(len(blocks.find(model))) if index != 1]


def rebuilt(model, kept):
    """A model of its own with copies of those layers: what a view has to equal."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kinds[index] for index in kept]
    fresh = AutoModelForCausalLM.from_config(config).eval()
    prefix = blocks.find(model)[0].name.rsplit(".", 1)[0]
    weights = model.state_dict()
    wanted = {}
    for name in fresh.state_dict():
        source = name
        if name.startswith(f"{prefix}."):
            number, rest = name[len(prefix) + 1 :].split(".", 1)
            source = f"{prefix}.{kept[int(number)]}.{rest}"
        wanted[name] = weights[source]
    fresh.load_state_dict(wanted)
    return fresh


# The view


@torch.inference_mode()
def test_a_view_equals_a_model_of_its_own_with_those_layers(lab, architecture):
    system = lab.system(architecture)
    for kept in (outer_layers(system.model), [1]):
        view = viewed(system, kept)
        other = rebuilt(system.model, kept)
        tokens = lab.prompt(30)
        ours, cache = [], view.new_cache(0)
        for piece in (tokens[:, :24], tokens[:, 24:25], tokens[:, 25:]):
            ours.append(view.step(piece, cache, keep=piece.shape[1]))
        torch.testing.assert_close(torch.cat(ours, 1), other(tokens).logits)
        assert cache.get_seq_length() == 30


def test_a_view_shares_every_weight(lab, architecture):
    model = lab.system(architecture).model
    held = {parameter.data_ptr() for parameter in model.parameters()}
    view = keeping(model, [0])
    assert {parameter.data_ptr() for parameter in view.parameters()} < held
    assert len(blocks.find(view)) == view.config.num_hidden_layers == 1


def test_the_model_stays_as_it_was(lab, architecture):
    system = lab.system(architecture)
    request = lab.request(lab.prompt(12), 12)
    config, plain = system.model.config.to_dict(), lab.rows(system.generate(request))
    modules = [(name, id(module)) for name, module in system.model.named_modules()]
    lab.rows(applied(system, keep=0.5).generate(request))
    assert system.model.config.to_dict() == config
    assert [(name, id(module)) for name, module in system.model.named_modules()] == modules
    assert lab.rows(system.generate(request)) == plain
    with torch.inference_mode():
        # Hooked by the view as well, each block would report twice.
        seen = system.model(lab.prompt(4), output_hidden_states=True).hidden_states
    assert len(seen) == system.model.config.num_hidden_layers + 1


def test_a_view_does_not_run_what_a_placement_hook_has_bound(lab):
    model = copy.deepcopy(lab.system("llama").model)
    model.model.forward = model.model.forward
    with torch.inference_mode():
        shorter = keeping(model, [0])(lab.prompt(5)).logits
        assert not torch.equal(shorter, model(lab.prompt(5)).logits)


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [2], [-1]])
def test_layers_that_are_not_there_are_refused(lab, kept):
    with pytest.raises(Conflict, match="blocks 0 to 1"):
        keeping(lab.system("llama").model, kept)


# The method


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"skip": (0,), "draft": 5}])
@pytest.mark.parametrize("length", [1, 14])
def test_greedy_tokens_equal_plain_decoding(lab, architecture, length, options):
    system = lab.system(architecture)
    request = lab.request(lab.prompt(length), 25)
    chunks = list(applied(system, **options).generate(request))
    assert lab.rows(chunks) == lab.rows(system.generate(request))
    assert sum(chunk.drafted for chunk in chunks) > 0


def test_rows_of_a_batch_get_what_they_get_alone(lab):
    system = lab.system("qwen3", double=True)
    rows = [lab.prompt(n, seed=n)[0].tolist() for n in (1, 5, 12, 30)]
    tokens, mask = pad(rows, device=torch.device("cpu"))
    helped = applied(system, keep=0.5)
    together = lab.rows(helped.generate(lab.request(tokens, 17, mask=mask)))
    alone = [lab.rows(system.generate(lab.request(torch.tensor([ids]), 17)))[0] for ids in rows]
    assert together == alone


def test_it_drafts_with_quantised_layers_where_the_target_has_them(open_stack, lab):
    request = lab.request(lab.prompt(20, vocabulary=500), 20)
    # The plain formula: fast products round differently by the number of rows.
    with dispatch.forced("reference"):
        with open_stack("quant/int8") as opened:
            plain = lab.rows(opened.system.generate(request))
        with open_stack("quant/int8", "speculative/layer_skip:skip=[2]") as opened:
            chunks = list(opened.system.generate(request))
            (draft,) = opened.system.drafts
            assert opened.system.facts["draft_layers"] == [0, 1, 3]
            held = {id(module) for module in opened.system.model.modules()}
            packed = [m for m in draft.model.modules() if type(m).__name__ == "PackedLinear"]
            assert len(packed) == 3 * 7 + 1  # and the head
            assert {id(module) for module in packed} <= held
    assert lab.rows(chunks) == plain
    assert sum(chunk.accepted for chunk in chunks) > 0


def test_sampled_requests_draw_from_the_view(lab):
    system = applied(lab.system("llama"), keep=0.5, draft=2)
    request = lab.request(lab.prompt(6), 5, sampling=SamplingSpec(temperature=1.0))
    drafter = system.decode.__self__.drafter(system, request)
    with torch.inference_mode():
        drafter.observe([lab.prompt(6)[0].tolist()])
        (draft,) = drafter.draft([4])
    assert len(draft.tokens) == 2
    assert draft.q.shape == (2, 300)


def test_layers_are_spread_evenly():
    assert spread(8, 0.5) == [0, 2, 5, 7]
    assert spread(4, 0.75) == [0, 2, 3]
    assert spread(30, 0.1) == [0, 14, 29]
    assert spread(2, 0.1) == [0]
    for layers in range(1, 40):
        for keep in (0.1, 0.25, 0.5, 0.75, 0.9):
            kept = spread(layers, keep)
            assert kept == sorted(set(kept))
            assert len(kept) == max(1, min(round(layers * keep), layers - 1))
            assert kept[-1] < layers


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"skip": [2, 1]}, "rising order"), ({"skip": [1, 1]}, "once"), ({"skip": []}, "empty")],
)
def test_parameters_are_checked(options, complaint):
    with pytest.raises(SpecError, match=complaint):
        LayerSkip.decode(options, where="speculative/layer_skip")


def test_a_model_of_one_layer_cannot_skip_any():
    with pytest.raises(Conflict, match="one layer only"):
        LayerSkip().kept(1)


@pytest.mark.parametrize("skip", ["[4]", "[0,1,2,3]", "[-1]"])
def test_layers_that_the_model_lacks_are_refused_before_it_is_loaded(open_stack, skip):
    with (
        pytest.raises(Conflict, match=r"layers 0 to 3"),
        open_stack(f"speculative/layer_skip:skip={skip}"),
    ):
        pass
