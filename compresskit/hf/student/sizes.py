"""How large a model is: from its config before any weights, and from the model itself.

Both count the same way, on the modules: the config is built on the meta device, which has shapes and
types but no memory. Predicted and real sizes therefore differ only if a maker made something else
than it said.

    parameters           shared ones once
    weight_bytes         in the type that each is saved in, shared ones once
    flops_per_token      2 x weights that a decode step multiplies with: linear layers, the head (also
                         where it shares the embedding), routers, and of the experts those that work
                         for a token. Attention over the cache, norms and the look-up are left out.
    kv_bytes_per_token   2 x key/value heads x head width, over the layers that keep keys and values.
                         A windowed layer keeps a token until the window has passed; its bytes count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compresskit.card import Size
from compresskit.errors import Conflict
from compresskit.hf import modules
from compresskit.hf.student.rebuild import skeleton


def size_of_config(config: Any, dtype: torch.dtype) -> Size:
    """Size of a model of `config` that is saved in `dtype`; no weights are made.

    Raises:
        Conflict: the bytes of its cache cannot be told from the config.
    """
    return size_of_model(skeleton(config, dtype))


def size_of_model(model: Any) -> Size:
    """Size of `model` as it is.

    Raises:
        Conflict: the bytes of its cache cannot be told from its config.
    """
    return Size(
        parameters=modules.parameter_count(model),
        weight_bytes=modules.weight_bytes(model),
        flops_per_token=2 * multiplied(model),
        kv_bytes_per_token=_kv_numbers(model.config) * model.dtype.itemsize,
    )


def multiplied(model: Any) -> int:
    """Weights that a decode step of one token multiplies with."""
    dense = sum(site.weight().numel() for site in modules.linears(model))
    experts = {id(site.module) for site in modules.experts(model)}
    active = 0
    for module in model.modules():
        if id(module) in experts:
            active += _active(module, model.config)
        elif modules.kind_of(module, nn.Parameter(torch.empty(0))) == "router":
            # A router multiplies with a matrix of its own, without being a linear layer.
            own = getattr(module, "weight", None)
            active += own.numel() if own is not None and own.dim() == 2 else 0
        elif isinstance(module, modules.HoldsBytes) and not hasattr(module, "embedding_dim"):
            active += modules.stands_for(module)
    return dense + active


def _active(experts: nn.Module, config: Any) -> int:
    """Weights of the experts that work for one token; all of them are equally large."""
    weights = [parameter for parameter in experts.parameters() if parameter.dim() == 3]
    return sum(w.numel() // w.shape[0] for w in weights) * int(config.num_experts_per_tok)


def _kv_numbers(config: Any) -> int:
    """Numbers in keys and values of one token, all layers together."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) or getattr(text, "num_kv_shared_layers", 0):
        raise Conflict(
            f"{text.model_type} compresses keys and values, or shares them between layers: how many bytes "
            "a token takes is not known here."
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    keeping = [kind for kind in kinds if "attention" in kind and "linear" not in kind]
    return 2 * int(heads) * int(width) * len(keeping)
