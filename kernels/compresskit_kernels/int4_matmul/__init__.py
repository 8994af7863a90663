"""Activations times a group-wise int4 weight (W4A16).

    y[m, n] = sum_k x[m, k] * ((code[n, k] - 8) * scales[n, k // G] + offsets[n, k // G])

x `[..., K]` float32, bfloat16 or float16; the weight as in `weight.Int4Weight`; y `[..., N]` in
the type of x. G is 32, 64, 128 or 256; any M, N, K, zero included, K need not divide by G.

Error against float64: the reference accumulates in float32; the others round x, y and (with many
rows) the dequantised weight to bfloat16, relative 2^-9 each, and accumulate in float32. A weight
quantised to nearest is within half a scale of the original, plus the rounding of scale and offset
to their type.

Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323, for the group-wise grid; rounding here is
plain round-to-nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dequantise import on_cuda, reference
from compresskit_kernels.dispatch import Op, choose
from compresskit_kernels.int4_matmul import cpu
from compresskit_kernels.int4_matmul.weight import Int4Weight, pack

if TYPE_CHECKING:
    import torch

OP: Op[Int4Weight] = Op(
    "int4_matmul",
    (cpu.IMPLEMENTATION, on_cuda("int4_matmul"), reference("int4_matmul")),
)


def int4_matmul(x: torch.Tensor, weight: Int4Weight, *, impl: str = "auto") -> torch.Tensor:
    """Multiply once; a model prepares the weight once instead and calls that."""
    return choose(OP, x, impl).prepare(weight)(x)


__all__ = ["OP", "Int4Weight", "int4_matmul", "pack"]
