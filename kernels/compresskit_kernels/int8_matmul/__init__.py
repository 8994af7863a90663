"""Activations times an int8 weight (W8A16).

    y[m, n] = sum_k x[m, k] * codes[n, k] * scales[n]

x `[..., K]` float32, bfloat16 or float16; codes int8 `[N, K]`; scales `[N]`; y `[..., N]` in the
type of x. Any M, N, K, zero included.

Error against float64: the reference accumulates in float32; the others round x to 16 bits (bfloat16,
or int16 with one step every 256 inputs at most), y to bfloat16
(relative 2^-9 each) and accumulate in float32. A weight quantised to nearest is within
scales[n] / 2 of the original.

Paper: Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, for row-wise absmax codes;
its outlier path and int8 activations are left out here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dequantise import on_cuda, reference
from compresskit_kernels.dispatch import Implementation, Op, choose
from compresskit_kernels.int8_matmul import cpu, native
from compresskit_kernels.int8_matmul.weight import Int8Weight
from compresskit_kernels.launch import implementation

if TYPE_CHECKING:
    import torch

TRITON: Implementation[Int8Weight] = implementation(
    "int8_matmul",
    "triton: int8 codes x one row (M = 1), on tensor cores (M <= 64), spread + matmul (M > 64)",
    "a weight that is not empty",
    lambda weight: min(weight.shape) > 0,
)

OP: Op[Int8Weight] = Op(
    "int8_matmul",
    (
        native.IMPLEMENTATION,
        cpu.IMPLEMENTATION,
        TRITON,
        on_cuda("int8_matmul"),
        reference("int8_matmul"),
    ),
)


def int8_matmul(x: torch.Tensor, weight: Int8Weight, *, impl: str = "auto") -> torch.Tensor:
    """Multiply once; a model prepares the weight once instead and calls that."""
    return choose(OP, x, weight, impl).prepare(weight)(x)


__all__ = ["OP", "Int8Weight", "int8_matmul"]
