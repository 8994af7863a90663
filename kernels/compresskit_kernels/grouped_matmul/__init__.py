"""Activations times a group-wise weight of 2 to 8 bits (W2A16 to W8A16, nf4, fp4, mxfp4).

    y[m, n] = sum_k x[m, k] * weight[n, k]        weight as in `weight.GroupedWeight`

x `[..., K]` float32, bfloat16 or float16; y `[..., N]` in the type of x. Any M, N, K, zero
included; K need not divide by the group.

Error against float64: the reference accumulates in float32; the others round x, y and (with many
rows) the dequantised weight to bfloat16, relative 2^-9 each, and accumulate in float32.

Papers: Frantar et al. 2022, GPTQ, arXiv 2210.17323, for the group-wise grid; Dettmers et al. 2023,
QLoRA, arXiv 2305.14314, for code books.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dequantise import on_cuda, reference
from compresskit_kernels.dispatch import Implementation, Op, choose
from compresskit_kernels.grouped_matmul import cpu, native
from compresskit_kernels.grouped_matmul.weight import GroupedWeight
from compresskit_kernels.launch import implementation
from compresskit_kernels.packed.tiles import fits_group

if TYPE_CHECKING:
    import torch


def _fits(weight: GroupedWeight) -> bool:
    return min(weight.shape) > 0 and fits_group(weight.group, weight.width, weight.bits)


TRITON: Implementation[GroupedWeight] = implementation(
    "grouped_matmul",
    "triton: packed codes x one row (M = 1), on tensor cores (M <= 64), spread + matmul (M > 64); "
    "codes of 3 bits take 4, of 5 to 7 take 8",
    "a weight that is not empty in groups that divide, or are divided by, 128 inputs (256 for 2 bits, "
    "64 for 5 and more)",
    _fits,
)

OP: Op[GroupedWeight] = Op(
    "grouped_matmul",
    (
        native.IMPLEMENTATION,
        cpu.IMPLEMENTATION,
        TRITON,
        on_cuda("grouped_matmul"),
        reference("grouped_matmul"),
    ),
)


def grouped_matmul(x: torch.Tensor, weight: GroupedWeight, *, impl: str = "auto") -> torch.Tensor:
    """Multiply once; a model prepares the weight once instead and calls that."""
    return choose(OP, x, weight, impl).prepare(weight)(x)


__all__ = ["OP", "GroupedWeight", "grouped_matmul"]
