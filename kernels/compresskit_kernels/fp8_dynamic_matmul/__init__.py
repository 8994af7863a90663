"""Activations rounded to e4m3 per token times an e4m3 weight (fp8 dynamic, W8A8).

    y[m, n] = steps[m] * scales[n] * sum_k codes[m, k] * weight.codes[n, k]

with `rounding.round_rows` over the whole row and the weight as in `fp8_matmul.Fp8Weight`. x
`[..., K]` float32, bfloat16 or float16; y `[..., N]` in the type of x. Any M, N, K, zero included.

Only `scaled` multiplies 8-bit floats as such. The others compute the same numbers on wider units:
good for quality, no measure of speed.

Error against float64 on the same codes: float32 rounding of the sum (`reference`, `native` with few
rows), bfloat16 rounding of the products of steps and scales (`native` with many), bfloat16 rounding
of y and the short accumulator of the tensor cores (`scaled`).

Paper: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dequantise import reference
from compresskit_kernels.dispatch import Op, choose
from compresskit_kernels.fp8_dynamic_matmul import native, scaled
from compresskit_kernels.fp8_dynamic_matmul.rounding import round_rows
from compresskit_kernels.fp8_matmul.weight import Fp8Weight

if TYPE_CHECKING:
    import torch


def _rounded(x: torch.Tensor, _: Fp8Weight) -> torch.Tensor:
    return round_rows(x).dequantise()


OP: Op[Fp8Weight] = Op(
    "fp8_dynamic_matmul",
    (scaled.IMPLEMENTATION, native.IMPLEMENTATION, reference("fp8_dynamic_matmul", _rounded)),
)

REAL = scaled.IMPLEMENTATION.detail
"""What the record says where 8-bit floats are multiplied as such."""


def fp8_dynamic_matmul(x: torch.Tensor, weight: Fp8Weight, *, impl: str = "auto") -> torch.Tensor:
    """Multiply once; a model prepares the weight once instead and calls that."""
    return choose(OP, x, weight, impl).prepare(weight)(x)


__all__ = ["OP", "REAL", "Fp8Weight", "fp8_dynamic_matmul", "round_rows"]
