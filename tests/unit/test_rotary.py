"""Moving rotated keys equals rotating them at the other place, for every kind that can be moved."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama

from compresskit.errors import Conflict
from compresskit.hf.rotary import Rotary

SCALED = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
WIDTH, ROWS, KEPT = 16, 24, 9


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def small(architecture, **options):
    shape = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**{**shape, **options})
    return AutoModelForCausalLM.from_config(config).eval()


def pruned(seed=0):
    """Keys before rotation `[2, 3, ROWS, WIDTH]`, and rows that stay, each head its own."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, ROWS, WIDTH, generator=generator)
    kept = torch.rand(2, 3, ROWS, generator=generator).topk(KEPT).indices.sort().values
    return keys, kept


def rows_of(x, kept):
    return x.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def rotated(module, apply, keys, positions):
    """The model's own rotation of `keys` at `positions` `[B, K, S]`, head by head."""
    out = torch.empty_like(keys)
    for head in range(keys.shape[1]):
        one = keys[:, head : head + 1]
        cos, sin = module(one, positions[:, head])
        out[:, head : head + 1] = apply(one, one, cos, sin)[1]
    return out


def errors(model, module, apply, dtype):
    """Largest error of moving what is stored as `dtype`, and of not moving, over the largest number."""
    keys, kept = pruned()
    places = torch.arange(ROWS).expand(2, 3, -1)
    close = torch.arange(KEPT).expand(2, 3, -1)
    want = rotated(module, apply, rows_of(keys, kept), close)
    have = rows_of(rotated(module, apply, keys, places), kept).to(dtype)
    moved = Rotary.of(model).move(have, close - kept)
    assert moved.dtype is dtype
    scale = want.abs().max()
    return [float((x.float() - want).abs().max() / scale) for x in (moved, have)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("kind", sorted(SCALED))
def test_prune_then_rotate_is_rotate_then_move(kind, dtype, bound):
    model = small("llama", rope_parameters=SCALED[kind])
    moved, left = errors(model, model.model.rotary_emb, llama.apply_rotary_pos_emb, dtype)
    assert moved <= bound
    assert left > 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_a_part_of_the_key_is_rotated(dtype, bound):
    options = {"rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
    model = small("gpt_neox", **options)
    assert Rotary.of(model).frequencies.shape == (WIDTH // 4,)
    module = model.gpt_neox.rotary_emb
    moved, left = errors(model, module, neox.apply_rotary_pos_emb, dtype)
    assert moved <= bound
    assert left > 0.1


def test_scaled_frequencies_matter():
    """Negative control: the default's frequencies on YaRN's keys."""
    plain = Rotary.of(small("llama", rope_parameters=SCALED["default"]))
    model = small("llama", rope_parameters=SCALED["yarn"])
    keys, _ = pruned()
    positions = torch.arange(ROWS).expand(2, 3, -1)
    have = rotated(model.model.rotary_emb, llama.apply_rotary_pos_emb, keys, positions)
    right, wrong = (one.move(have, -positions) for one in (Rotary.of(model), plain))
    assert (right - wrong).abs().max() > 0.1
    with pytest.raises(Conflict, match="cannot be moved"):
        plain.check(model)


def test_moving_there_and_back_is_nothing():
    rotary = Rotary.of(small("llama"))
    keys, _ = pruned()
    far = torch.tensor([100])
    torch.testing.assert_close(rotary.move(rotary.move(keys, far), -far), keys, rtol=0, atol=1e-5)
    assert torch.equal(rotary.move(keys, torch.zeros(1)), keys)


def test_every_architecture_that_rotates_is_understood(lab, architecture):
    model = lab.system(architecture).model
    if architecture == "gpt2":
        with pytest.raises(Conflict, match="gpt2 has no rotary positions"):
            Rotary.of(model)
    else:
        Rotary.of(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_understood_in_sixteen_bits_too(lab, dtype):
    for name in ("llama", "gpt_neox", "gemma3_text"):
        Rotary.of(copy.deepcopy(lab.system(name).model).to(dtype))


def test_layers_without_rotation_are_noticed():
    """SmolLM3 leaves it out in every fourth layer: their keys must not be turned."""
    kind = {"num_hidden_layers": 4, "pad_token_id": 0}
    every = small("smollm3", **kind, no_rope_layers=[1, 1, 1, 1])
    some = small("smollm3", **kind, no_rope_layers=[1, 1, 1, 0])
    Rotary.of(every)
    with pytest.raises(Conflict, match=r"leaves the rotation out \(seen in layer 3\)"):
        Rotary.of(some)


def test_neighbouring_pairs_are_noticed():
    with pytest.raises(Conflict, match=r"another way than by halves.*seen in layer 0"):
        Rotary.of(small("cohere"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dynamic", {"factor": 2.0}),
        (
            "longrope",
            {
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
def test_frequencies_that_change_with_the_text_are_refused(kind, options):
    model = small("llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **options})
    with pytest.raises(Conflict, match=f"{kind!r} rotary positions"):
        Rotary.of(model)
