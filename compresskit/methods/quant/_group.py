"""Rounding to a grid of 2 to 8 bits per group of inputs: the core of int4, intN and their kin."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from compresskit_kernels import grouped_dynamic_matmul, grouped_matmul
from compresskit_kernels.grouped_matmul import GroupedWeight
from compresskit_kernels.packing import pack
from torch.nn import functional

from compresskit.methods.quant._linear import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
Group = Literal[0, 32, 64, 128, 256]
ZeroPoint = Literal["float", "integer"]
Activations = Literal["float", "int8"]


class Grid(NamedTuple):
    """The levels of each group of weights.

    weight = (code - 2^(bits - 1)) * scale + offset, or with zeros (code - zero) * scale.
    """

    scales: torch.Tensor
    """`[N, groups]`, in the type it is stored in."""
    offsets: torch.Tensor | None
    zeros: torch.Tensor | None
    bits: int

    def centre(self) -> torch.Tensor:
        """The code that stands for zero, float32 `[N, groups]`; not whole with offsets."""
        middle = float(2 ** (self.bits - 1))
        if self.zeros is not None:
            return self.zeros.float()
        if self.offsets is None:
            return torch.full_like(self.scales, middle, dtype=torch.float32)
        return middle - self.offsets.float() / self.step()

    def step(self) -> torch.Tensor:
        """Scales without zeros, float32 `[N, groups]`: what codes are counted in."""
        scales = self.scales.float()
        return scales.where(scales > 0, 1.0)

    def codes(self, grouped: torch.Tensor) -> torch.Tensor:
        """Nearest codes of weights `[N, groups, G]`, float32 from 0 to 2^bits - 1."""
        middle = 2 ** (self.bits - 1)
        codes: torch.Tensor
        if self.offsets is not None:
            centred = grouped - self.offsets.float().unsqueeze(2)
            codes = torch.round(centred / self.step().unsqueeze(2)) + middle
        else:
            zero = middle if self.zeros is None else self.zeros.float().unsqueeze(2)
            codes = torch.round(grouped / self.step().unsqueeze(2)) + zero
        return codes.clamp(0, 2**self.bits - 1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights that codes `[N, groups, G]` stand for."""
        scales = self.scales.float().unsqueeze(2)
        values: torch.Tensor
        if self.offsets is not None:
            values = (codes - 2 ** (self.bits - 1)) * scales + self.offsets.float().unsqueeze(2)
        else:
            zero = 2 ** (self.bits - 1) if self.zeros is None else self.zeros.float().unsqueeze(2)
            values = (codes - zero) * scales
        return values


def group_size(group: int, width: int) -> int:
    """Inputs a group: `group`, or all of them for 0."""
    return group or max(1, width)


def grouped(weight: torch.Tensor, size: int) -> torch.Tensor:
    """`[N, K]` -> `[N, groups, size]`, a ragged last group filled with its last column.

    That changes neither of the group's extremes.
    """
    rows, width = weight.shape
    filled = functional.pad(weight, (0, -width % size))
    if width % size:
        filled[:, width:] = weight[:, -1:]
    return filled.view(rows, -1, size)


def fit(
    weights: torch.Tensor,
    *,
    bits: int,
    symmetric: bool,
    zero_point: ZeroPoint = "float",
    dtype: torch.dtype = torch.bfloat16,
) -> Grid:
    """The grid of weights `[N, groups, G]` (float32) from their extremes.

    Symmetric: the largest magnitude / (2^bits - 1) / 2, no offset. Asymmetric: from minimum to
    maximum, with the middle level as a float offset, or with an integer zero point, for which the
    range is widened to include zero (as in compressed-tensors). Scale and offset are rounded to
    `dtype` here, so that codes are taken against what is stored.
    """
    levels = 2**bits - 1
    if symmetric:
        scales = (weights.abs().amax(dim=2) / (levels / 2)).to(dtype)
        return Grid(scales, None, None, bits)
    low, high = weights.amin(dim=2), weights.amax(dim=2)
    if zero_point == "integer":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scales = ((high - low) / levels).to(dtype)
    if zero_point == "float":
        offsets = (low + 2 ** (bits - 1) * scales.float()).to(dtype)
        return Grid(scales, offsets, None, bits)
    step = scales.float().where(scales > 0, 1.0)
    zeros = torch.round(-low / step).clamp(0, levels).to(torch.uint8)
    return Grid(scales, None, zeros, bits)


def store(codes: torch.Tensor, grid: Grid, width: int, size: int) -> GroupedWeight:
    """Pack codes `[N, groups, G]` of a weight with `width` inputs."""
    flat = codes.reshape(codes.shape[0], -1)[:, :width]
    return GroupedWeight(
        pack(flat, grid.bits), grid.scales, width, size, grid.bits, grid.offsets, grid.zeros
    )


def quantise(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = False,
    zero_point: ZeroPoint = "float",
    dtype: torch.dtype = torch.bfloat16,
) -> GroupedWeight:
    """Round `weight` (float32 `[N, K]`) to the nearest level of its group's grid."""
    size = group_size(group, weight.shape[1])
    parts = grouped(weight, size)
    grid = fit(parts, bits=bits, symmetric=symmetric, zero_point=zero_point, dtype=dtype)
    return store(grid.codes(parts), grid, weight.shape[1], size)


def product(activations: Activations) -> Any:
    """The operation that multiplies by a group-wise weight."""
    return grouped_matmul.OP if activations == "float" else grouped_dynamic_matmul.OP


def scheme(
    rounding: Callable[..., GroupedWeight] = quantise,
    *,
    bits: int,
    activations: Activations = "float",
    **options: Any,
) -> Scheme[GroupedWeight]:
    """A scheme that rounds every row with `rounding(weight, bits=..., **options)`."""
    return Scheme(product(activations), bits, partial(rounding, bits=bits, **options))
