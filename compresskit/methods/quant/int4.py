"""Weights in 4 bits, a scale and an offset per group."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from compresskit_kernels.int4_matmul import OP, Int4Weight, pack
from pydantic import JsonValue
from torch.nn import functional

from compresskit.method import AbstractMethod, Stage
from compresskit.methods.quant._linear import Scheme, quantise_linears
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System


def quantise(
    weight: torch.Tensor, *, group: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16
) -> Int4Weight:
    """Round `weight` (float32 `[N, K]`) to 16 levels per group of `group` along K.

    Asymmetric: the levels run from the group's minimum to its maximum. Symmetric: they are
    multiples of the largest magnitude / 7.5, from -8 to 7, and the offset is zero. Codes are taken
    against scale and offset as stored in `dtype`.
    """
    rows, width = weight.shape
    filled = functional.pad(weight, (0, -width % group))
    if width % group:
        # Repeat the last column, so that filling a ragged group changes neither of its extremes.
        filled[:, width:] = weight[:, -1:]
    grouped = filled.view(rows, -1, group)
    if symmetric:
        scales = (grouped.abs().amax(dim=2) / 7.5).to(dtype)
        offsets = None
        centred = grouped
    else:
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)
        scales = ((high - low) / 15).to(dtype)
        offsets = (low + 8 * scales.float()).to(dtype)
        centred = grouped - offsets.float().unsqueeze(2)
    step = scales.float().where(scales > 0, 1.0).unsqueeze(2)
    codes = (torch.round(centred / step) + 8).clamp(0, 15)
    return Int4Weight(pack(codes.view(rows, -1)), scales, offsets, width, group)


@final
class Int4(AbstractMethod):
    """Store each linear weight as int4 with a scale and an offset per group of inputs (W4A16).

    Round to nearest; activations stay in 16 bits. The packed product runs in bfloat16 whatever
    the model computes in. Groups of 32 with an offset are the grid of common 4-bit files (Q4_1):
    re-quantising such a file on it looks lossless, so the default is 64, and a warning is left in
    the facts when the error is too small to be true.

    Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323 (its round-to-nearest baseline, grouped).
    Differs: no error compensation; symmetric layers keep a zero offset for the packed product.
    Cost: one float pass over the weights at load, no calibration; with more than 64 rows a CPU
    unpacks the codes into floats in every call.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    example: ClassVar[Mapping[str, JsonValue]] = {"group": 32}

    group: Literal[32, 64, 128, 256] = 64
    """Weights that share a scale, along the input; a ragged last group is filled up."""
    symmetric: bool = False
    """Levels around zero without an offset, instead of from minimum to maximum."""
    head: bool = True
    """Quantise the output head too; if it is tied, the embedding stays dense beside it."""
    skip: tuple[str, ...] = ()
    """Layers to leave dense, as patterns of module names, such as "*.down_proj"."""

    def effects(self) -> Effects:
        """Takes the float weights away, and with them the claim to equal tokens."""
        return Effects(
            requires=frozenset({Trait.MODULES, Trait.FLOAT_WEIGHTS}),
            removes=frozenset({Trait.FLOAT_WEIGHTS, Trait.LOSSLESS}),
        )

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        rounding = partial(quantise, group=self.group, symmetric=self.symmetric)
        scheme = Scheme(op=OP, bits=4, quantise=rounding)
        return quantise_linears(system, scheme, with_head=self.head, skip=self.skip)
