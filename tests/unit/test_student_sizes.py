"""Sizes against other counters: torch's own of operations, and arithmetic on paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from compresskit.errors import Conflict
from compresskit.hf.student.sizes import size_of_config, size_of_model
from compresskit.hf.tiny import ARCHITECTURES, random_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operations_are_those_that_torch_counts(architecture):
    """All matrix products of a one-token forward, except those of rotary angles and attention."""
    model = random_model(architecture)
    # The grouped product of experts has no formula in torch's counter; one by one they are linear.
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.tensor([[7]]), use_cache=False)
    counts = counter.get_flop_counts()
    matrices = sum(
        flops for operation, flops in counts["Global"].items() if "attention" not in str(operation)
    )
    angles = sum(
        sum(operations.values())
        for module, operations in counts.items()
        if module.endswith("rotary_emb")
    )
    assert size_of_model(model).flops_per_token == matrices - angles


def test_sizes_of_a_known_model():
    """SmolLM2-135M, from its published config; parameters as its checkpoint has them."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    size = size_of_config(config, torch.bfloat16)
    assert size.parameters == 134_515_008
    assert size.weight_bytes == 2 * size.parameters
    assert size.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2
    block = 576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536
    assert size.flops_per_token == 2 * (30 * block + 49152 * 576)


def test_shared_heads_are_held_once_and_multiplied_all_the_same():
    tied, untied = (
        size_of_model(random_model("llama", tie_word_embeddings=shared)) for shared in (True, False)
    )
    assert untied.parameters - tied.parameters == 512 * 64
    assert untied.flops_per_token == tied.flops_per_token


def test_more_experts_hold_more_and_multiply_with_a_larger_router_only():
    four, eight = (
        size_of_model(random_model("mixtral", num_local_experts=count)) for count in (4, 8)
    )
    assert eight.parameters - four.parameters == 2 * 4 * (3 * 64 * 128 + 64)
    assert eight.flops_per_token - four.flops_per_token == 2 * 2 * 4 * 64


def test_what_cannot_be_counted_is_refused():
    model = random_model("llama")
    model.model.layers[0].experts = nn.Module()
    model.model.layers[0].experts.weight = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(Conflict, match=r"layers\.0\.experts holds experts in a form"):
        size_of_model(model)
    model = random_model("llama")
    model.config.kv_lora_rank = 8
    with pytest.raises(Conflict, match="how many bytes a token takes"):
        size_of_model(model)


def test_layers_without_keys_take_no_cache():
    model = random_model("qwen3", num_hidden_layers=3)
    whole = size_of_model(model).kv_bytes_per_token
    model.config.layer_types = ["full_attention", "linear_attention", "linear_attention"]
    assert size_of_model(model).kv_bytes_per_token == whole // 3
