"""Rounding to a code book: 16 levels that need not be evenly spaced, times one scale a block.

    weight[k] = levels[code[k]] * scale of the block        scale = largest magnitude in the block

The 4-bit types of QLoRA. Levels are listed by code, which is also how bitsandbytes numbers them, so
codes can be compared and exchanged; only the order of nibbles in a byte differs (theirs puts the
first code into the high half, ours into the low half).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from compresskit_kernels.grouped_matmul import OP, GroupedWeight
from compresskit_kernels.packing import pack

from compresskit.methods.quant._group import grouped
from compresskit.methods.quant._linear import Scheme

Block = Literal[32, 64, 128]

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E)."""

_FP4 = (0.0, 0.0052083335, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
FP4 = (*_FP4, *(-level for level in _FP4))
"""Sign, two bits of exponent, one of mantissa, over 12, as in bitsandbytes: code 1, the smallest
number, is 1/192 where E2M1 would have 1/24."""


def nearest(values: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """Codes (uint8) of the levels nearest to `values`; a tie goes to the lower level.

    Counts the midpoints below each value: for 16 levels much faster than a search.
    """
    ordered, order = torch.sort(torch.tensor(levels, dtype=torch.float32), stable=True)
    place = torch.zeros_like(values, dtype=torch.uint8)
    for midpoint in ((ordered[:-1] + ordered[1:]) / 2).tolist():
        place += values > midpoint
    codes = order.to(device=values.device, dtype=torch.uint8)
    return place if torch.equal(order, torch.arange(len(levels))) else codes[place.int()]


def quantise(
    weight: torch.Tensor,
    levels: tuple[float, ...],
    *,
    block: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> GroupedWeight:
    """Round `weight` (float32 `[N, K]`) to the nearest of `levels` times its block's maximum.

    Scales and levels are rounded to `dtype`; codes are taken against the scale as stored, which in
    float32 makes them those of bitsandbytes, bit by bit, wherever K divides by `block`.
    """
    rows, width = weight.shape
    blocks = grouped(weight, block)
    scales = blocks.abs().amax(dim=2).to(dtype)
    inverse = 1 / scales.float().clamp(min=1e-38)
    codes = nearest((blocks * inverse.unsqueeze(2)).clamp(-1, 1), levels)
    book = tuple(torch.tensor(levels, dtype=torch.float32).to(dtype).tolist())
    flat = codes.view(rows, -1)[:, :width]
    return GroupedWeight(pack(flat, 4), scales, width, block, 4, table=book)


def scheme(levels: tuple[float, ...], block: int) -> Scheme[GroupedWeight]:
    """A scheme that rounds every row to `levels`."""
    return Scheme(OP, 4, partial(quantise, levels=levels, block=block))
