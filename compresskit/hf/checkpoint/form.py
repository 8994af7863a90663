"""How a stored weight is written: its scheme in words of compressed-tensors, and its tensors.

    op                        stored weight        format            scheme
    grouped_matmul            codes of 2-8 bits    pack-quantized    WnA16, groups or whole rows
    grouped_dynamic_matmul    codes of 2-8 bits    pack-quantized    WnA8, activations per group
    int8_matmul               int8, a row a scale  pack-quantized    W8A16, whole rows
    int8_dynamic_matmul       int8, a row a scale  int-quantized     W8A8, activations per token
    fp8_matmul                e4m3, a row a scale  float-quantized   FP8 weights
    fp8_dynamic_matmul        e4m3, a row a scale  float-quantized   FP8, activations per token

Our packed stream is that of `pack-quantized`, bit for bit, so packed codes are written as they
are. What the format has no place for (float offsets, code books, a ragged last group) is refused
with the option that avoids it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from compresskit_kernels.fp8_matmul import Fp8Weight
from compresskit_kernels.grouped_matmul import GroupedWeight
from compresskit_kernels.int8_matmul import Int8Weight
from compresskit_kernels.packing import pack, unpack

from compresskit.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Format = Literal["pack-quantized", "int-quantized", "float-quantized"]
Stored = GroupedWeight | Int8Weight | Fp8Weight


@dataclass(frozen=True)
class Rounding:
    """How numbers are rounded: the fields of compressed-tensors' `QuantizationArgs` that we use."""

    bits: int
    kind: Literal["int", "float"]
    strategy: Literal["group", "channel", "token"]
    group: int | None = None
    symmetric: bool = True
    dynamic: bool = False

    def document(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "group_size": self.group,
            "strategy": self.strategy,
            "dynamic": self.dynamic,
        }


@dataclass(frozen=True)
class Form:
    """One way to write a layer; layers of one form share a config group."""

    format: Format
    weights: Rounding
    activations: Rounding | None = None

    def name(self) -> str:
        """Short name, such as W4A16 (group 64, symmetric)."""
        weights, inputs = self.weights, self.activations
        prefix = "FP" if weights.kind == "float" else "W"
        acts = "16" if inputs is None else ("FP8" if inputs.kind == "float" else str(inputs.bits))
        each = f"group {weights.group}" if weights.group else "per row"
        sides = "symmetric" if weights.symmetric else "zero points"
        return f"{prefix}{weights.bits}A{acts} ({each}, {sides})"

    def document(self, targets: list[str]) -> dict[str, Any]:
        """One config group of config.json."""
        return {
            "targets": targets,
            "weights": self.weights.document(),
            "input_activations": self.activations and self.activations.document(),
            "output_activations": None,
            "format": self.format,
        }


_INT8_PER_TOKEN = Rounding(8, "int", "token", dynamic=True)
_FP8_PER_TOKEN = Rounding(8, "float", "token", dynamic=True)
_BY_ROW: Mapping[str, Form] = {
    "int8_matmul": Form("pack-quantized", Rounding(8, "int", "channel")),
    "int8_dynamic_matmul": Form("int-quantized", Rounding(8, "int", "channel"), _INT8_PER_TOKEN),
    "fp8_matmul": Form("float-quantized", Rounding(8, "float", "channel")),
    "fp8_dynamic_matmul": Form("float-quantized", Rounding(8, "float", "channel"), _FP8_PER_TOKEN),
}


def form_of(op: str, weight: object, layer: str) -> Form:
    """The form of a stored weight that the operation `op` multiplies by.

    Raises:
        Conflict: compressed-tensors has no place for something in it; names the way out.
    """
    if isinstance(weight, GroupedWeight):
        return _grouped(op, weight, layer)
    if isinstance(weight, Int8Weight | Fp8Weight) and op in _BY_ROW:
        return _BY_ROW[op]
    raise Conflict(
        f"{layer}: {type(weight).__name__} of {op} has no compressed-tensors format. "
        "Use quant/int4:symmetric=true, quant/int8, quant/int8_dynamic or quant/fp8."
    )


def skipping(layers: Iterable[str]) -> str:
    """The option of a method that leaves `layers` and their like in other blocks dense.

    >>> skipping(["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"])
    'skip=["*.down_proj","lm_head"]'
    """
    patterns = [f"*.{name.rpartition('.')[2]}" if "." in name else name for name in layers]
    return f"skip=[{','.join(json.dumps(one) for one in dict.fromkeys(patterns))}]"


def _grouped(op: str, weight: GroupedWeight, layer: str) -> Form:
    if weight.table is not None or weight.gain != 1.0:
        raise Conflict(
            f"{layer}: weights in a code book are not written as compressed-tensors. "
            "Use quant/int4 with symmetric=true or zero_point=integer."
        )
    if weight.offsets is not None:
        raise Conflict(
            f"{layer}: compressed-tensors has no float offsets, only integer zero points. Add "
            "zero_point=integer or symmetric=true to the method (quant/hqq knows neither)."
        )
    whole = weight.group >= weight.width
    if not whole and weight.width % weight.group:
        raise Conflict(
            f"{layer}: groups of {weight.group} do not divide its {weight.width} inputs, which "
            "compressed-tensors asks for. Use a group that does, group=0 for whole rows, or leave "
            f"such layers dense with {skipping([layer])}."
        )
    group = None if whole else weight.group
    strategy: Literal["channel", "group"] = "channel" if whole else "group"
    codes = Rounding(weight.bits, "int", strategy, group, symmetric=weight.zeros is None)
    if op == "grouped_matmul":
        return Form("pack-quantized", codes)
    inputs = _INT8_PER_TOKEN if whole else Rounding(8, "int", "group", group, dynamic=True)
    return Form("pack-quantized", codes, inputs)


def tensors_of(form: Form, weight: Stored, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of one layer by their name in the checkpoint, without a bias.

    Scales are written in the model's `dtype`, as other writers do: readers multiply in the type of
    the scales, so in float32 nothing is rounded.
    """
    if isinstance(weight, GroupedWeight):
        tensors = {
            "weight_packed": _words(weight.packed),
            "weight_scale": _in(weight.scales, dtype),
            "weight_shape": torch.tensor(weight.shape),
        }
        if weight.zeros is not None:
            # Zero points are packed along the rows of the weight.
            packed = _words(pack(weight.zeros.t().contiguous(), weight.bits))
            tensors["weight_zero_point"] = packed.t().contiguous()
        return tensors
    scales = _in(weight.scales, dtype).unsqueeze(1)
    if form.format != "pack-quantized":
        return {"weight": weight.codes, "weight_scale": scales}
    codes = (weight.codes.to(torch.int16) + 128).to(torch.uint8)
    return {
        "weight_packed": _words(pack(codes, 8)),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }


def weight_of(form: Form, tensors: Mapping[str, torch.Tensor]) -> Stored:
    """Undo `tensors_of`: the stored weight of a layer that a checkpoint holds in this form."""
    scales = tensors["weight_scale"]
    if form.format == "float-quantized":
        return Fp8Weight(tensors["weight"], _one_a_row(scales, tensors["weight"].shape[0]))
    if form.format == "int-quantized":
        return Int8Weight(tensors["weight"], _one_a_row(scales, tensors["weight"].shape[0]))
    rows, width = (int(size) for size in tensors["weight_shape"])
    bits = form.weights.bits
    zeros = None
    if not form.weights.symmetric:
        packed = tensors["weight_zero_point"].t().contiguous()
        zeros = unpack(packed.view(torch.uint8), bits, rows).t().contiguous()
    return GroupedWeight(
        packed=tensors["weight_packed"].contiguous().view(torch.uint8),
        scales=scales.reshape(rows, -1),
        width=width,
        group=form.weights.group or width,
        bits=bits,
        zeros=zeros,
    )


def _in(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in `dtype` where it holds them exactly (float16 lacks the range of bfloat16)."""
    cast = scales.to(dtype)
    return cast if torch.equal(cast.float(), scales.float()) else scales


def _words(packed: torch.Tensor) -> torch.Tensor:
    """Bytes `[N, 4 W]` as 32-bit words `[N, W]`, low bytes first."""
    return packed.contiguous().view(torch.int32)


def _one_a_row(scales: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales `[N, 1]`, or one for the whole weight, as `[N]`."""
    return scales.reshape(-1).expand(rows).contiguous()
