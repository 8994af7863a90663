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

from typing import TYPE_CHECKING, Any

from compresskit.card import Size
from compresskit.errors import Conflict
from compresskit.hf import modules
from compresskit.hf.student.rebuild import skeleton

if TYPE_CHECKING:
    import torch


def size_of_config(config: Any, dtype: torch.dtype) -> Size:
    """Size of a model of `config` that is saved in `dtype`; no weights are made.

    Raises:
        Conflict: the bytes of its cache, or what its experts do, cannot be told from the config.
    """
    return size_of_model(skeleton(config, dtype))


def size_of_model(model: Any) -> Size:
    """Size of `model` as it is.

    Raises:
        Conflict: the bytes of its cache, or what its experts do, cannot be told from its config.
    """
    return Size(
        parameters=modules.parameter_count(model),
        weight_bytes=modules.weight_bytes(model),
        flops_per_token=2 * multiplied(model),
        kv_bytes_per_token=_kv_numbers(model.config) * model.dtype.itemsize,
    )


def multiplied(model: Any) -> int:
    """Weights that a decode step of one token multiplies with.

    Raises:
        Conflict: there are routed experts of which it is not known how many work for a token.
    """
    total = sum(site.weight().numel() for site in modules.linears(model))
    experts = {id(site.module) for site in modules.experts(model)}
    for name, module in model.named_modules():
        if isinstance(module, modules.HoldsBytes):
            # A packed embedding is looked up, not multiplied with.
            total += 0 if hasattr(module, "embedding_dim") else modules.stands_for(module)
            continue
        for weight in module.parameters(recurse=False):
            kind = modules.kind_of(module, weight)
            if kind == "experts" and id(module) not in experts:
                raise Conflict(
                    f"{name} holds experts in a form that is not known here, so what a decode step "
                    "multiplies with cannot be told."
                )
            if kind == "experts":
                total += weight.numel() // weight.shape[0] * int(model.config.num_experts_per_tok)
            elif kind == "router" and weight.dim() == 2:
                total += weight.numel()
    return total


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
