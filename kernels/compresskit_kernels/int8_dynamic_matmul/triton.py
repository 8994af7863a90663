"""Triton kernels for int8 activations times int8 weights: round rows, multiply, scale in one go.

    round_rows   one program a token: largest magnitude, step, codes; x is read once
    product      tensor cores on int8, int32 sums; the last instruction applies both scales
    add_up       few rows: the inputs are split to fill the GPU, int32 parts added exactly

Codes keep their stored layout `[N, K]`: the int8 matrix instructions want both operands with the
inputs side by side. Rows are padded to 16 inputs, so that every copy is of 16 bytes. A few rows use
the same kernel with a small tile: the codes' memory traffic sets the pace, not the tensor cores.
"""
# Triton's language has types of its own:
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.nn import functional

from compresskit_kernels import launch, traced
from compresskit_kernels.dispatch import Prepared, Use, note

if TYPE_CHECKING:
    from compresskit_kernels.int8_matmul.weight import Int8Weight

RAN = Use("int8_dynamic_matmul", "triton: int8 tensor cores, fused rounding and scales")
LONGEST_BLOCK = 8192
"""Inputs of a row that one program holds in registers at once."""
SPLIT_ROWS = 64
"""Most rows for which the inputs are split: beyond, there are tiles enough."""


@triton.jit
def nearest(value):
    """Round to the nearest integer, half to even, below 2^22: what adding 1.5 * 2^23 leaves."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def round_rows(x, codes, steps, K, PADDED, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    """Codes `[M, PADDED]` and steps `[M]` of x `[M, K]`; a row longer than `BLOCK` is read twice."""
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    codes += row * PADDED
    k = tl.arange(0, BLOCK)
    value = tl.load(x + k, k < K, 0.0).to(tl.float32)
    top = tl.max(tl.abs(value), 0)
    if not ONCE:
        for start in range(BLOCK, K, BLOCK):
            more = tl.load(x + start + k, start + k < K, 0.0).to(tl.float32)
            top = tl.maximum(top, tl.max(tl.abs(more), 0))
    step = tl.math.div_rn(top, 127.0)
    tl.store(steps + row, step)
    step = tl.where(step > 0, step, 1.0)
    tl.store(codes + k, nearest(tl.math.div_rn(value, step)).to(tl.int8), k < PADDED)
    if not ONCE:
        for start in range(BLOCK, PADDED, BLOCK):
            value = tl.load(x + start + k, start + k < K, 0.0).to(tl.float32)
            code = nearest(tl.math.div_rn(value, step)).to(tl.int8)
            tl.store(codes + start + k, code, start + k < PADDED)


@triton.jit
def product(
    codes, weight, steps, scales, out, M, N, PADDED, SPLITS, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Give y `[M, N]` when `FINAL`, else int32 parts `[SPLITS, M, N]`; `WHOLE`: DEPTH divides K.

    Programs of eight blocks of rows walk through the columns together, so that what one reads of
    the weight the others find in the second-level cache.
    """
    down = tl.cdiv(M, ROWS)
    across = tl.cdiv(N, WIDTH)
    band = tl.program_id(0) // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    place = tl.program_id(0) % (8 * across)
    m = (band * 8 + place % height) * ROWS + tl.arange(0, ROWS)
    n = place // height * WIDTH + tl.arange(0, WIDTH)
    k = tl.arange(0, DEPTH)
    # Rows beyond the end repeat the last one; what they give is not stored.
    left = codes + tl.minimum(m, M - 1)[:, None].to(tl.int64) * PADDED + k[None, :]
    right = weight + tl.minimum(n, N - 1)[None, :].to(tl.int64) * PADDED + k[:, None]
    turns = tl.cdiv(PADDED, DEPTH)
    share = tl.cdiv(turns, SPLITS)
    first = tl.program_id(1) * share
    acc = tl.zeros([ROWS, WIDTH], tl.int32)
    for turn in range(first, tl.minimum(first + share, turns)):
        start = turn * DEPTH
        if WHOLE:
            acc = tl.dot(tl.load(left + start), tl.load(right + start), acc, out_dtype=tl.int32)
        else:
            here = start + k < PADDED
            a = tl.load(left + start, here[None, :], 0)
            b = tl.load(right + start, here[:, None], 0)
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if FINAL:
        at = m[:, None].to(tl.int64) * N + n[None, :]
        step = tl.load(steps + m, m < M, 0.0)
        scale = tl.load(scales + n, n < N, 0.0).to(tl.float32)
        y = acc.to(tl.float32) * step[:, None] * scale[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), inside)
    else:
        at = (tl.program_id(1) * M + m[:, None]).to(tl.int64) * N + n[None, :]
        tl.store(out + at, acc, inside)


@triton.jit
def add_up(parts, steps, scales, y, M, N, SPLITS, BLOCK: tl.constexpr):
    """Sum int32 parts `[SPLITS, M, N]` and apply both scales; a program takes a piece of one row."""
    m = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.int32)
    for part in range(SPLITS):
        acc += tl.load(parts + (part * M + m).to(tl.int64) * N + n, n < N, 0)
    out = acc.to(tl.float32) * tl.load(steps + m) * tl.load(scales + n, n < N, 0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64) * N + n, out.to(y.dtype.element_ty), n < N)


class Int8Product(Prepared):
    """Codes `[N, K]` padded to 16 inputs, and scales."""

    __slots__ = ("__weakref__", "codes", "height", "number", "padded", "scales", "width")

    def __init__(self, weight: Int8Weight) -> None:
        """Keep the codes as they are, where no padding is due."""
        self.height, self.width = weight.shape
        self.padded = self.width + -self.width % 16
        self.codes = functional.pad(weight.codes, (0, self.padded - self.width)).contiguous()
        self.scales = weight.scales.contiguous()
        self.number = traced.register(self)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`."""
        if torch.compiler.is_compiling():
            return traced.product(x, self.number, self.height)
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]` in code that is not traced."""
        note(RAN)
        flat = x.reshape(-1, self.width).contiguous()
        y = flat.new_empty(flat.shape[0], self.height)
        if flat.shape[0]:
            with launch.on(flat):
                self._multiply(*self.round(flat), y)
        return y.view(*x.shape[:-1], self.height)

    def round(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 `[M, padded K]` and steps float32 `[M]` of x `[M, K]`."""
        rows = flat.shape[0]
        codes = flat.new_empty(rows, self.padded, dtype=torch.int8)
        steps = flat.new_empty(rows, dtype=torch.float32)
        block = min(triton.next_power_of_2(self.padded), LONGEST_BLOCK)
        round_rows[(rows,)](
            flat, codes, steps, self.width, self.padded, BLOCK=block, ONCE=self.padded <= block,
            num_warps=max(1, min(8, block // 512)), **launch.FUSED,
        )  # fmt: skip
        return codes, steps

    def _multiply(self, codes: torch.Tensor, steps: torch.Tensor, y: torch.Tensor) -> None:
        rows = y.shape[0]
        tile = launch.tile("int8_product", rows, y.device)
        programs = -(-rows // tile.rows) * -(-self.height // tile.columns)
        turns = -(-self.padded // tile.depth)
        parts = 1
        if rows <= SPLIT_ROWS:
            parts = launch.splits(programs, turns, tile.waves, y.device)
            parts = -(-turns // -(-turns // parts))  # none without work
        final = parts == 1
        out = y if final else y.new_empty(parts, rows, self.height, dtype=torch.int32)
        product[(programs, parts)](
            codes, self.codes, steps, self.scales, out, rows, self.height, self.padded, parts,
            ROWS=tile.rows, WIDTH=tile.columns, DEPTH=tile.depth,
            WHOLE=self.padded % tile.depth == 0, FINAL=final,
            num_warps=tile.warps, num_stages=tile.stages, **launch.FUSED,
        )  # fmt: skip
        if not final:
            add_up[(-(-self.height // 512), rows)](
                out, steps, self.scales, y, rows, self.height, parts, BLOCK=512, **launch.FUSED
            )

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight."""
        return self.look_up(index)

    def look_up(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight: plain torch, which can be traced as it is."""
        codes = self.codes[index][..., : self.width]
        return codes.float() * self.scales[index].float().unsqueeze(-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes and scales."""
        return {"codes": self.codes, "scales": self.scales}


def prepare(weight: Int8Weight) -> Prepared:
    """Lay out a weight."""
    return Int8Product(weight)
