"""The shapes of known models, without their weights: what the public config.json of each says.

Speed, memory and energy of a dense model depend on its shape and hardly on what its weights hold,
so they can be measured where the weights cannot be had. `random.py` fills a shape with random numbers.

    divided     widths and heads by a whole number, for a trial run that takes seconds
    parameters  counted from the shape alone
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
_LLAMA_3: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
_STRETCHED: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN_3: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}

SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3.1-8b": {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "head_dim": 128,
            "rope_scaling": {**_STRETCHED, "factor": 8.0},
            "tie_word_embeddings": False,
        },
        "llama-3.2-1b": {
            **_LLAMA_3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "rope_scaling": {**_STRETCHED, "factor": 32.0},
            "tie_word_embeddings": True,
        },
        "qwen3-0.6b": {
            **_QWEN_3,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        "smollm2-135m": {
            **_LLAMA,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        "qwen3-30b-a3b": {
            **_QWEN_3,
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
        },
    }
)
"""Name -> config, with the rotary fields under their old names, which every transformers 5 reads."""

WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads")


def divided(config: Mapping[str, Any], by: int) -> dict[str, Any]:
    """The config with its widths and query heads divided; width of a head and vocabulary stay.

    Raises:
        ValueError: a width is not a multiple of `by`, or heads no longer share kv heads evenly.
    """
    smaller = dict(config)
    for name in WIDTHS:
        if name not in config:
            continue
        if config[name] % by:
            raise ValueError(f"{name} is {config[name]}, no multiple of {by}")
        smaller[name] = config[name] // by
    smaller["num_key_value_heads"] = max(1, config["num_key_value_heads"] // by)
    if smaller["num_attention_heads"] % smaller["num_key_value_heads"]:
        raise ValueError(
            f"{smaller['num_attention_heads']} heads cannot share {smaller['num_key_value_heads']} kv heads"
        )
    return smaller


def parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a model of this shape, tied ones once."""
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    head = config["head_dim"]
    attention = 2 * width * head * (heads + shared)
    if config["model_type"] != "llama":  # Qwen 3 normalises queries and keys
        attention += 2 * head
    experts = config.get("num_experts")
    if experts:
        feed = experts * width * (1 + 3 * config["moe_intermediate_size"])
    else:
        feed = 3 * width * config["intermediate_size"]
    table = config["vocab_size"] * width
    tables = table if config["tie_word_embeddings"] else 2 * table
    return int(tables + depth * (attention + feed + 2 * width) + width)
