"""Build small models with random weights, one for each architecture that compresskit supports.

    model = random_model("qwen3", seed=0)
    model = random_model("llama", num_hidden_layers=3, dtype=torch.bfloat16)

They exist so that a test can ask of *every* architecture "does the hook fire, does the cache crop,
are the linears found?" in well under a second and without a download. Random weights prove
mechanics only: shapes, masks, equality of two code paths. They never say anything about quality,
because there is none to lose; quality is measured on the trained models of `compresskit.assets`.

The vocabulary is the one of the shipped tokenizer (512 entries, ids 0-2 pad, bos, end), so its
tokens can be fed to any of these models. Weights are drawn with a large deviation (0.25): with the
usual 0.02 attention would be nearly flat and a wrong mask or a lost key would hardly show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from compresskit.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
    "tie_word_embeddings": True,
}

_DECODER: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}

_ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DECODER),
    "qwen2": ("qwen2", {**_DECODER, "use_sliding_window": False}),
    "qwen3": ("qwen3", {**_DECODER, "use_sliding_window": False}),
    "olmo2": ("olmo2", _DECODER),
    # One layer of each kind; the window is short enough for test prompts to run over it.
    "gemma3": (
        "gemma3_text",
        {
            **_DECODER,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "mixtral": (
        "mixtral",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            **_COMMON,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
        },
    ),
    # GPT-2 names its sizes differently and keeps its linears transposed, in `Conv1D`.
    "gpt2": (
        "gpt2",
        {**_COMMON, "n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 2048},
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(sorted(_ARCHITECTURES))
"""Names that `random_model` takes."""


def random_model(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Return a small model of `architecture` in evaluation mode, its weights fixed by `seed`.

    Args:
        architecture: One of `ARCHITECTURES`.
        seed: Fixes the weights; the caller's random state is left as it was.
        dtype: Weights are drawn in float32 and then converted, so that models of one seed differ
            between dtypes by rounding only.
        overrides: Fields of the architecture's configuration, by transformers' names.
    """
    if architecture not in _ARCHITECTURES:
        raise UnknownName("architecture", architecture, ARCHITECTURES)
    kind, fields = _ARCHITECTURES[architecture]
    config = AutoConfig.for_model(kind, **{**fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _roughen(model)
    # Defaults that a checkpoint's generation_config.json would otherwise supply.
    model.generation_config = GenerationConfig(
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        do_sample=False,
    )
    return model.to(dtype).eval()


@torch.no_grad()
def _roughen(model: PreTrainedModel) -> None:
    """Give values to the parameters that a fresh model leaves neutral and that could hide a bug.

    A bias of zero can be lost unnoticed; a gain of one on normalised queries and keys leaves
    attention nearly flat whatever `initializer_range` is.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(0.0, 0.1)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            # Gemma stores a gain as its distance from one, the others as it is: adding suits both.
            parameter.add_(1.0)
