"""Activations rounded to int8 per token times an int8 weight (W8A8).

    y[m, n] = steps[m] * scales[n] * sum_k codes[m, k] * weight.codes[n, k]

with `activations.round_rows` over the whole row and the weight as in `int8_matmul.Int8Weight`.
x `[..., K]` float32, bfloat16 or float16; y `[..., N]` in the type of x. The sum is one of integers
and exact.

Paper: Yao et al. 2022, ZeroQuant, arXiv 2206.01861 (token-wise int8 activations).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.activations import round_rows
from compresskit_kernels.dequantise import reference
from compresskit_kernels.dispatch import Implementation, Op, choose
from compresskit_kernels.int8_dynamic_matmul import native, onednn
from compresskit_kernels.int8_matmul.weight import Int8Weight
from compresskit_kernels.launch import implementation

if TYPE_CHECKING:
    import torch


def _rounded(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    return round_rows(x).dequantise()


LONGEST = 1 << 16
"""Inputs: 65536 * 127 * 127 still fits the 32-bit sums."""

TRITON: Implementation[Int8Weight] = implementation(
    "int8_dynamic_matmul",
    "triton: int8 tensor cores, fused rounding and scales",
    f"a weight of 1 to {LONGEST} inputs that is not empty",
    lambda weight: min(weight.shape) > 0 and weight.shape[1] <= LONGEST,
)

OP: Op[Int8Weight] = Op(
    "int8_dynamic_matmul",
    (
        native.IMPLEMENTATION,
        onednn.IMPLEMENTATION,
        TRITON,
        reference("int8_dynamic_matmul", _rounded),
    ),
)


def int8_dynamic_matmul(x: torch.Tensor, weight: Int8Weight, *, impl: str = "auto") -> torch.Tensor:
    """Multiply once; a model prepares the weight once instead and calls that."""
    return choose(OP, x, weight, impl).prepare(weight)(x)


__all__ = ["OP", "Int8Weight", "int8_dynamic_matmul"]
