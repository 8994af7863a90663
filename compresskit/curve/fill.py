"""Fill a cache to a length without a prefill.

For each layer: random keys and values of the shape and type that the model itself makes go through
`update`; a layer that drops rows by attention is then asked by the newest queries, as at the end of
a prompt. All others (dense, sliding, static, codes) are filled by `update` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.errors import Conflict
from compresskit.hf.attention import Call
from compresskit.hf.cache import new_dynamic, owner

if TYPE_CHECKING:
    from compresskit.system import System

JUDGES = 64
"""Newest queries that look at the filled cache: as many as the widest default of any method."""


class Shape(NamedTuple):
    """One layer's keys and values of one token."""

    keys: tuple[int, int]
    """Key/value heads and head dimension."""
    values: tuple[int, int]
    dtype: torch.dtype


@torch.inference_mode()
def shapes(system: System) -> list[Shape | None]:
    """What each layer of the model hands to its cache: seen in one forward pass of one token.

    None for a layer that has no keys (recurrent, shared).
    """
    cache = new_dynamic(system.model.config)
    # Not `system.step`: a method may have wrapped it.
    system.model(
        torch.zeros(1, 1, dtype=torch.long, device=system.device.torch), past_key_values=cache
    )
    found: list[Shape | None] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4:
            found.append(
                Shape(
                    (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]), keys.dtype
                )
            )
        else:
            found.append(None)
    return found


@torch.inference_mode()
def filled(system: System, tokens: int, capacity: int, *, batch: int = 1, seed: int = 0) -> Any:
    """Return a cache of `system` that has seen `tokens` random tokens a row, with room for `capacity`.

    Raises:
        Conflict: the cache holds no keys and values that could be filled in (kv/none).
    """
    cache = system.new_cache(capacity)
    layers = getattr(cache, "layers", None)
    seen = shapes(system)
    if not layers or len(layers) != len(seen):
        raise Conflict(
            "this cache holds no keys and values, so it cannot be filled without a prefill. Leave the "
            "method out of the curve."
        )
    modules = _attentions(system.model)
    for index, shape in enumerate(seen):
        if shape is None:
            continue
        generator = torch.Generator(system.device.torch).manual_seed(seed + index)
        keys, values = (
            torch.randn(
                (batch, heads, tokens, width), generator=generator, device=system.device.torch
            ).to(shape.dtype)
            for heads, width in (shape.keys, shape.values)
        )
        held, values = cache.update(keys, values, index)
        layer = owner(held)
        # Only a layer that drops rows by attention does something when it is asked.
        if layer is not None and getattr(layer, "watches", False):
            heads = _query_heads(system.model, shape.keys[0])
            asked = min(JUDGES, tokens)
            query = torch.randn(
                (batch, heads, asked, shape.keys[1]), generator=generator, device=held.device
            ).to(shape.dtype)
            scale = shape.keys[1] ** -0.5
            layer.attend(Call(modules[index], query, held, values, None, scale, {}))
    return cache


def _query_heads(model: Any, kv_heads: int) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "num_attention_heads", kv_heads))


def _attentions(model: Any) -> dict[int, torch.nn.Module]:
    """Attention modules by the number of their layer."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    }
