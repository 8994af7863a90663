"""Rounding in the forward pass: exactly what packing gives, and nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compresskit_kernels import dispatch
from torch import nn
from torch.nn import functional

from compresskit import catalogue
from compresskit.device import resolve
from compresskit.distill import finish
from compresskit.errors import SpecError
from compresskit.hf import modules
from compresskit.hf.packed import PackedEmbedding, PackedLinear
from compresskit.hf.tiny import random_model
from compresskit.method import Context
from compresskit.methods.quant._experts import PackedExperts
from compresskit.system import System

INT3 = "quant/intn:bits=3"
TOKENS = torch.arange(24).view(2, 12) * 7 % 512


def packed(model: Any, text: str) -> Any:
    """`model`, taken apart: the artefact that `text` makes of it."""
    spec = catalogue.parse_method(text)
    nothing: dict[str, Any] = dict.fromkeys(("tokenizer", "step", "new_cache", "decode"))
    system = System(model=model, device=resolve("cpu"), context=64, **nothing)
    context: Any = Context(load=None, calibration=None, seed=0, dtype="float32")  # type: ignore[arg-type]
    method = catalogue.decode(spec.name, spec.params)
    # Fast products keep their weights in bfloat16; the reference hands out what is stored.
    with dispatch.forced("reference"):
        return method.apply(system, context).model


def stored(model: Any) -> dict[str, torch.Tensor]:
    """Name of each packed weight -> what it stands for, float32 `[N, K]`."""
    found: dict[str, torch.Tensor] = {}

    def take(name: str, module: Any, rows: int) -> None:
        found[name] = module.product.rows(torch.arange(rows)).float()

    for name, module in model.named_modules():
        if isinstance(module, PackedEmbedding):
            take(name, module, module.num_embeddings)
        elif isinstance(module, PackedLinear):
            take(name, module, module.out_features)
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            for part, layers in (("first", module.first), ("second", module.second)):
                parts = [found.pop(f"{name}.{part}.{i}") for i in range(len(layers))]
                found[f"{name}.{part}"] = torch.stack(parts)
    return found


def read(model: Any) -> dict[str, torch.Tensor]:
    """The same of a model whose weights read rounded."""
    found = {}
    for name, module in model.named_modules():
        for attribute in vars(module).get(finish.STATE, ()):
            weight = getattr(module, attribute).detach().float()
            if attribute == "weight":
                found[name] = weight.t() if turned(module) else weight
            else:
                part = "second" if attribute == "down_proj" else "first"
                found[f"{name}.{part}"] = weight.transpose(1, 2) if module.is_transposed else weight
    return found


def turned(module: nn.Module) -> bool:
    """Whether the inputs run along the first dimension (GPT-2's Conv1D)."""
    return not isinstance(module, nn.Linear | nn.Embedding)


VARIANTS = (
    *finish.supported(),
    "quant/intn:bits=2,group=32,symmetric=true",
    'quant/intn:bits=4,layers=["*.down_proj=8","model.layers.0.self_attn.*=dense"]',
    "quant/int4:zero_point=integer,activations=int8",
    "quant/nf4:head=false",
    'quant/int8:skip=["*.mlp.*"]',
    "quant/mxfp4:activations=fp4",
)


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("embeddings", [False, True])
def test_layers_read_what_the_artefact_stores(text: str, embeddings: bool) -> None:
    if embeddings and "head=false" in text:
        pytest.skip("a tied embedding is packed with its head or not at all")
    text = f"{text}{',' if ':' in text else ':'}embeddings=true" if embeddings else text
    model = random_model("llama")
    finish.begin(model, text)
    seen = read(model)
    finish.end(model)
    want = stored(packed(model, text))
    assert seen.keys() == want.keys()
    assert len(seen) > 4
    assert all(torch.equal(seen[name], want[name]) for name in want)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "mixtral", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("text", ["quant/int4", "quant/nvfp4"])
def test_layers_read_what_is_stored_in_every_kind_of_layer(architecture: str, text: str) -> None:
    text = f"{text}:embeddings=true"
    model = random_model(architecture)
    finish.begin(model, text)
    seen = read(model)
    finish.end(model)
    want = stored(packed(model, text))
    assert seen.keys() == want.keys()
    assert all(torch.equal(seen[name], want[name]) for name in want)


def test_another_grid_reads_otherwise() -> None:
    model = random_model("llama")
    finish.begin(model, "quant/intn:bits=3")
    seen = read(model)
    finish.end(model)
    want = stored(packed(model, "quant/intn:bits=3,group=32"))
    assert not any(torch.equal(seen[name], want[name]) for name in want)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_logits_and_gradients_are_those_of_a_model_that_holds_the_rounded_weights(
    architecture: str,
) -> None:
    model, twin = random_model(architecture), random_model(architecture)
    finish.begin(model, INT3)
    rounded = read(model)
    if modules.is_tied(twin):  # the head is rounded, the embedding is not
        modules.head(twin).weight = nn.Parameter(twin.get_input_embeddings().weight.clone())
    with torch.no_grad():
        for name, values in rounded.items():
            if name.endswith((".first", ".second")):
                path, _, part = name.rpartition(".")
                whole = f"{path}.{'down_proj' if part == 'second' else 'gate_up_proj'}"
                twin.get_parameter(whole).copy_(values)
            else:
                whole = f"{name}.weight"
                weight = twin.get_parameter(whole)
                weight.copy_(values.t() if turned(twin.get_submodule(name)) else values)
    for each in (model, twin):
        functional.cross_entropy(
            each(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
        ).backward()
    assert torch.equal(model(TOKENS).logits, twin(TOKENS).logits)
    tied = modules.head(twin).weight.grad
    want = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        other = want[name].grad
        if parameter is model.get_input_embeddings().weight:
            other = other + tied
        assert parameter.grad is not None and torch.allclose(
            parameter.grad, other, rtol=1e-5, atol=1e-7
        )


def test_nothing_of_the_model_changes_but_what_is_read() -> None:
    model, plain = random_model("mixtral"), random_model("mixtral")
    before = [type(module) for module in model.modules()]
    parameters = dict(model.named_parameters())
    finish.begin(model, INT3)
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert not torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    model.load_state_dict(plain.state_dict())
    finish.end(model)
    finish.end(model)  # nothing left to end
    assert [type(module) for module in model.modules()] == before
    assert modules.head(model).weight is parameters["model.embed_tokens.weight"]
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


def test_beginning_anew_takes_the_new_method() -> None:
    model = random_model("llama")
    finish.begin(model, "quant/int8")
    finish.begin(model, INT3)
    seen = read(model)
    finish.end(model)
    assert type(modules.head(model)) is nn.Linear
    want = stored(packed(model, INT3))
    assert all(torch.equal(seen[name], want[name]) for name in want)


def optimizers(weight: nn.Parameter) -> dict[str, Any]:
    adam = torch.optim.AdamW
    return {
        "plain": adam([weight], lr=0.1, foreach=False),
        "foreach": adam([weight], lr=0.1, foreach=True),
        "fused": adam([weight], lr=0.1, fused=True),
        "muon": torch.optim.Muon([weight], lr=0.1),
        "sgd": torch.optim.SGD([weight], lr=0.1, momentum=0.9),
    }


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused", "muon", "sgd"])
def test_weights_are_rounded_anew_after_a_step_and_not_before(kind: str) -> None:
    model = random_model("llama")
    site = modules.linears(model)[0]
    finish.begin(model, INT3)
    rounded = vars(site.module)[finish.STATE]["weight"]
    optimizer = optimizers(site.module._parameters["weight"])[kind]  # type: ignore[arg-type]
    first = site.module.weight
    model(TOKENS).logits.square().mean().backward()
    model(TOKENS).logits.square().mean().backward()  # a second half of the batch
    assert site.module.weight.data_ptr() == first.data_ptr()  # nothing was rounded in between
    before = rounded.value.clone()
    optimizer.step()
    after = site.module.weight.detach()
    assert not torch.equal(after, before)
    finish.end(model)
    assert torch.equal(after, stored(packed(model, INT3))[site.name])


def test_bfloat16_autocast_and_an_evaluation_in_between() -> None:
    model = random_model("llama")
    finish.begin(model, INT3)
    with torch.inference_mode():  # asks first: what it leaves behind must serve the step
        model(TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(TOKENS).logits
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_copy_has_a_rounding_of_its_own() -> None:
    model = random_model("llama")
    finish.begin(model, INT3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj._parameters["weight"].zero_()
    assert not twin.model.layers[0].mlp.up_proj.weight.any()
    assert model.model.layers[0].mlp.up_proj.weight.any()


def test_rounded_as_the_saved_student_will_be() -> None:
    model = random_model("llama")
    finish.begin(model, "quant/int4", saved_as=torch.bfloat16)
    seen = read(model)
    finish.end(model)
    want = stored(packed(copy.deepcopy(model).to(torch.bfloat16), "quant/int4"))
    assert all(torch.equal(seen[name], want[name]) for name in want)
    exact = stored(packed(model, "quant/int4"))
    assert not all(torch.equal(seen[name], exact[name]) for name in want)


@pytest.mark.parametrize("text", ["quant/gptq", "quant/mixed", "quant/awq", "kv/int8"])
def test_methods_that_need_more_than_the_weight_are_refused_by_name(text: str) -> None:
    with pytest.raises(SpecError, match=rf"{text}.*quant/intn"):
        finish.check(text)


def test_what_does_not_suit_the_model_leaves_it_alone() -> None:
    model = random_model("llama")
    with pytest.raises(SpecError, match="no_such_layer"):
        finish.begin(model, 'quant/int4:skip=["no_such_layer"]')
    with pytest.raises(SpecError, match="shares its weight"):
        finish.begin(model, "quant/int4:head=false,embeddings=true")
    assert not any(finish.STATE in vars(module) for module in model.modules())
