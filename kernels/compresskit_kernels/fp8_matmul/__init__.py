"""Activations times an e4m3 weight (fp8 weight-only, W8A16).

    y[m, n] = scales[n] * sum_k x[m, k] * codes[n, k]          codes are float8_e4m3fn numbers

x `[..., K]` float32, bfloat16 or float16; y `[..., N]` in the type of x. Any M, N, K, zero included.

Paper: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dequantise import on_cuda, reference
from compresskit_kernels.dispatch import Implementation, Op, choose
from compresskit_kernels.fp8_matmul import native
from compresskit_kernels.fp8_matmul.weight import LARGEST, Fp8Weight
from compresskit_kernels.launch import implementation

if TYPE_CHECKING:
    import torch

TRITON: Implementation[Fp8Weight] = implementation(
    "fp8_matmul",
    "triton: e4m3 codes x one row (M = 1), on tensor cores (M <= 64), spread + matmul (M > 64)",
    "a weight that is not empty",
    lambda weight: min(weight.shape) > 0,
)

OP: Op[Fp8Weight] = Op(
    "fp8_matmul",
    (native.IMPLEMENTATION, TRITON, on_cuda("fp8_matmul"), reference("fp8_matmul")),
)


def fp8_matmul(x: torch.Tensor, weight: Fp8Weight, *, impl: str = "auto") -> torch.Tensor:
    """Multiply once; a model prepares the weight once instead and calls that."""
    return choose(OP, x, weight, impl).prepare(weight)(x)


__all__ = ["LARGEST", "OP", "Fp8Weight", "fp8_matmul"]
