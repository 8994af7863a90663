"""Quantised layers that other libraries put into a model while transformers loads it.

bitsandbytes hides scales in the state of its weights, GPTQ and AWQ layers keep everything in
buffers; counted by parameters they would look smaller than they are, in bytes and in numbers. Each
such layer is given `held_bytes` and `held_tensors`, so that it answers for itself as ours do.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compresskit.hf.modules import HoldsBytes

if TYPE_CHECKING:
    from collections.abc import Iterator

ROLES = {
    "scales": ("scale", "absmax", "scb", "code"),
    "zero_points": ("zero", "offset"),
    "bias": ("bias",),
}
"""Role of a tensor by what its name contains, in this order; the rest is packed weights."""


def quiet() -> None:
    """Keep bitsandbytes from logging a line in every call of an 8-bit layer."""
    for chatty in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def account(model: nn.Module) -> dict[str, int]:
    """Make every foreign quantised layer of `model` answer for its bytes; return them by class."""
    layers: list[Any] = [module for module in model.modules() if _is_foreign(module)]
    for layer in layers:
        layer.held_tensors = lambda layer=layer: [tensor for _, tensor in _tensors(layer)]
        layer.held_bytes = lambda layer=layer: _bytes(layer)
    names = [type(layer).__name__ for layer in layers]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _is_foreign(module: Any) -> bool:
    if isinstance(module, HoldsBytes) or type(module) in (nn.Linear, nn.Bilinear, Conv1D):
        return False
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and next(_tensors(module), None) is not None


def _bytes(layer: Any) -> dict[str, int]:
    held: dict[str, int] = {}
    for name, tensor in _tensors(layer):
        low = name.lower()
        role = next((r for r, words in ROLES.items() if any(w in low for w in words)), "packed")
        held[role] = held.get(role, 0) + tensor.untyped_storage().nbytes()
    return held


def _tensors(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that `layer` keeps, each storage once."""
    seen: set[int] = set()
    for name, tensor in _named(layer):
        key = tensor.untyped_storage().data_ptr()
        if key not in seen:
            seen.add(key)
            yield name, tensor


def _named(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is None:
            continue
        yield name, tensor
        yield from _inside(getattr(tensor, "quant_state", None))
        yield from _inside(tensor, ("CB", "SCB"))
    yield from _inside(getattr(layer, "state", None), ("CB", "SCB"))


def _inside(state: Any, names: tuple[str, ...] = ("absmax", "code", "offset")) -> Any:
    """The tensors in attributes of a library's state object, nested states included."""
    if state is None:
        return
    for name in names:
        value = getattr(state, name, None)
        if isinstance(value, torch.Tensor):
            yield name, value
    inner = getattr(state, "state2", None)
    if inner is not None:
        yield from _inside(inner)
