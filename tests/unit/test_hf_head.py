"""Models in two parts: whose logits are head(hidden states), with known scales and caps, and whose not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compresskit.errors import Conflict
from compresskit.hf import head
from compresskit.hf.tiny import ARCHITECTURES, random_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPED = {
    "gemma2": ({"final_logit_softcapping": 30.0}, head.Shape(cap=30.0)),
    "granite": ({"logits_scaling": 8.0}, head.Shape(scale=0.125)),
    "cohere": ({"logit_scale": 0.0625}, head.Shape(scale=0.0625)),
}


def shaped(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **options)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def same_logits(model: Any) -> bool:
    base, top = head.split(model)
    tokens = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    return torch.equal(top(base(tokens).last_hidden_state), model(tokens).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_comes_apart(architecture, dtype):
    assert same_logits(random_model(architecture, dtype=dtype))


@pytest.mark.parametrize("kind", SHAPED)
def test_scales_and_caps_are_found(kind):
    options, expected = SHAPED[kind]
    model = shaped(kind, **options)
    assert head.shape(model) == expected
    assert same_logits(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.001,
        lambda logits: logits + 0.1,
        # Of logits near 1, as a random model has, this cap takes less than a thousandth.
        lambda logits: torch.tanh(logits / 50) * 50,
        lambda logits: logits[..., :-1],
    ],
    ids=["scale", "shift", "cap", "cut"],
)
def test_what_is_not_known_is_refused(change, monkeypatch):
    model = random_model("llama")
    inner = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    head.split(model)
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(Conflict, match="LlamaForCausalLM does more between its last hidden state"):
        head.split(model)


def test_a_cap_that_the_config_does_not_tell_the_truth_about_is_refused():
    model = shaped("gemma2", final_logit_softcapping=30.0)
    model.config.final_logit_softcapping = None
    assert head.shape(model) == head.Shape()  # the model reads it from there too
    granite = shaped("granite", logits_scaling=8.0)
    granite.config.final_logit_softcapping = 30.0
    with pytest.raises(Conflict, match="known soft cap"):
        head.split(granite)


def test_a_base_model_has_no_head():
    with pytest.raises(Conflict, match="no output layer"):
        head.split(random_model("llama").base_model)


def test_the_probe_leaves_no_trace():
    model = random_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    head.split(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_hooks
