"""One program a row, which stays in registers between the norm and the rounding.

x is read once and the codes are written once: 3 bytes a number in bfloat16 instead of the 8 that a
norm followed by a maximum and a rounding move. Both sums of the row are reductions in float32.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compresskit_kernels.activations import Rounded
from compresskit_kernels.dispatch import Use, note

ROUTINE = Use("norm_quantise", "triton: norm + round")

PER_WARP = 512
"""Numbers of a row that one warp holds, 16 a lane."""


@triton.jit
def norm_row(
    x: tl.tensor,
    weight: tl.tensor,
    codes: tl.tensor,
    steps: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    shift: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Norm and round one row of `width` numbers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    keep = at < width
    values = tl.load(x + row * stride + at, mask=keep, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=keep, other=0.0).to(tl.float32) + shift
    mean = tl.sum(values * values, axis=0) / width
    normed = tl.where(keep, values * (1.0 / tl.sqrt_rn(mean + eps)) * factor, 0.0)
    step = tl.div_rn(tl.max(tl.abs(normed), axis=0), 127.0)
    level = tl.div_rn(normed, tl.where(step > 0.0, step, 1.0))
    # Adding 1.5 * 2^23 leaves no bits behind the point: rounded, halves to even.
    level = (level + 12582912.0) - 12582912.0
    tl.store(codes + row * width + at, level.to(tl.int8), mask=keep)
    tl.store(steps + row, step)


def norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float) -> Rounded:
    """As `norm_quantise`."""
    note(ROUTINE)
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    steps = torch.empty((rows.shape[0], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    norm_row[(rows.shape[0],)](
        rows,
        weight.contiguous(),
        codes,
        steps,
        width,
        rows.stride(0),
        eps,
        shift,
        BLOCK=block,
        num_warps=warps(block),
    )
    return Rounded(codes, steps, width)


def warps(block: int) -> int:
    """Warps of a program that holds `block` numbers."""
    return max(1, min(16, block // PER_WARP))
