"""The shapes of the three tiny models.

    role     architecture   layers   width   FFN            parameters
    target   Llama          4        128     384               853,120
    draft    Llama          2         64     256               180,544
    moe      Mixtral        2        128     8 experts x 64    559,744

All share the vocabulary (512) and the heads (4 query, 2 key/value, 32 wide). Every inner dimension
is a multiple of 32 and 64, and in the target of 128, so that quantization groups of those sizes fit
without padding; output dimensions are multiples of 16, as kernels' tiles want.

The draft is made as a student of the target (see `draft`), whose maker draws the very weights that are
drawn here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from benchmarks.tiny.tokenizer import BOS, CONTEXT, EOS, PAD, VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["target", "draft", "moe"]
ROLES: tuple[Role, ...] = ("target", "moe", "draft")
"""In training order: the draft learns from the finished target."""

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    # transformers' default of 0.02 is meant for wide models; 1/sqrt(width) is near 0.09 here.
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-5,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

EMBEDDING_SCALE = 8.0
"""Spread of the embedding against that of the other weights at the start."""


def build_model(role: Role, seed: int) -> PreTrainedModel:
    """Return the untrained float32 model of `role`, its weights fixed by `seed`."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if role == "target":
        model = LlamaForCausalLM(
            LlamaConfig(**SHARED, hidden_size=128, num_hidden_layers=4, intermediate_size=384)
        )
    elif role == "draft":
        model = LlamaForCausalLM(
            LlamaConfig(**SHARED, hidden_size=64, num_hidden_layers=2, intermediate_size=256)
        )
    else:
        model = MixtralForCausalLM(
            MixtralConfig(
                **SHARED,
                hidden_size=128,
                num_hidden_layers=2,
                intermediate_size=64,
                num_local_experts=8,
                num_experts_per_tok=2,
                router_aux_loss_coef=0.01,
                sliding_window=None,
            )
        )
    # Names play the same part in every text, so early training moves their embeddings together.
    # Starting far apart (and moving slowly, see train.py) is meant to keep them distinct. Runs
    # without it had not learned whose value is asked by 2,600 steps, but several things changed
    # together between the recipes that were tried: which one mattered was not isolated.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(EMBEDDING_SCALE)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    return model
