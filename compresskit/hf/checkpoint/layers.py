"""Find the packed layers of a system that was opened for writing, with their stored weights.

Writing needs the portable form of every weight, not a layout for this machine, so the stack has to
be applied under `compresskit_kernels.dispatch.forced("reference")`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from compresskit_kernels.dequantise import Dequantised
from torch import nn

from compresskit.errors import Conflict, RunError
from compresskit.hf import modules
from compresskit.hf.checkpoint.form import Form, form_of, skipping, tensors_of


class Layer(NamedTuple):
    """A packed layer as it will be written."""

    name: str
    form: Form
    tensors: dict[str, torch.Tensor]
    """By full name in the checkpoint, the bias included."""
    shape: tuple[int, int]


def packed_layers(model: Any) -> list[Layer]:
    """Every packed linear layer of `model`, in its order.

    Raises:
        Conflict: something was packed that compressed-tensors has no place for, or nothing was.
        RunError: the stack was not applied under `forced("reference")`.
    """
    _refuse_experts(model)
    _refuse_scaled(model)
    dtype: torch.dtype = model.dtype
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, modules.HoldsBytes):
            continue
        if not hasattr(module, "in_features"):
            raise Conflict(
                f"{name}: a packed embedding cannot be written. Leave embeddings=true out."
                if hasattr(module, "embedding_dim")
                else f"{name}: packed by a layer that has no compressed-tensors form."
            )
        found.append(_layer(name, module, dtype))
    if not found:
        raise Conflict(
            "nothing was packed, so there is nothing to write. Give a quantising method, such as "
            "--method quant/int4:symmetric=true."
        )
    _refuse_other_classes(model, found)
    return found


def _refuse_other_classes(model: Any, found: list[Layer]) -> None:
    """Refuse what replaced something other than `nn.Linear`, which readers would not look for.

    A twin without storage tells what was there before.
    """
    with torch.device("meta"):
        twin = type(model)(model.config)
    for layer in found:
        kind = type(twin.get_submodule(layer.name)).__name__
        if kind != "Linear":
            raise Conflict(
                f"{layer.name}: a {kind} in this architecture; compressed-tensors knows layers of "
                "the class Linear only, so that the model cannot be written."
            )


def _layer(name: str, module: Any, dtype: torch.dtype) -> Layer:
    product = getattr(module, "product", None)
    if product is None:
        raise Conflict(
            f"{name}: a layer of another library has no compressed-tensors form. Use our methods, "
            "such as quant/int4:symmetric=true, quant/int8 or quant/fp8."
        )
    if not isinstance(product, Dequantised):
        raise RunError(f"{name}: laid out for this machine ({type(product).__name__}).")
    weight: Any = product.weight
    form = form_of(product.routine.op, weight, name)
    tensors = {f"{name}.{role}": one for role, one in tensors_of(form, weight, dtype).items()}
    if module.bias is not None:
        tensors[f"{name}.bias"] = module.bias
    return Layer(name, form, tensors, weight.shape)


def _refuse_scaled(model: Any) -> None:
    scaled = [
        name
        for name, module in model.named_modules()
        if getattr(module, "input_scale", None) is not None
    ]
    if scaled:
        raise Conflict(
            f"{scaled[0]}{f' and {len(scaled) - 1} more' if scaled[1:] else ''}: the inputs are "
            "multiplied by a scale at run time, which compressed-tensors has no place for. Use "
            f"fold_only=true, or leave such layers dense with {skipping(scaled)}."
        )


def _refuse_experts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "first") and isinstance(module.first, nn.ModuleList):
            raise Conflict(
                f"{name}: packed experts are not written yet. "
                'Leave them dense with skip=["*.experts"].'
            )
