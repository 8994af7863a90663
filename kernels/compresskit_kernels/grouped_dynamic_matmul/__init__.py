"""Activations rounded to int8 times a group-wise weight of 2 to 8 bits (W2A8 to W8A8).

    y[m, n] = sum_k codes[m, k] * steps[m, k // G] * weight[n, k]

with `activations.round_rows` along the weight's own groups, and the weight as in
`grouped_matmul.GroupedWeight` without a code book. x `[..., K]` float32, bfloat16 or float16; y
`[..., N]` in the type of x. Within a group all products are of integers, so that the sum is exact.

Error against float64 on the same codes: float32 rounding of the sum over groups.

Paper: Yao et al. 2022, ZeroQuant, arXiv 2206.01861 (token-wise activations, group-wise weights).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.activations import round_rows
from compresskit_kernels.dequantise import on_cuda, reference
from compresskit_kernels.dispatch import Op, choose
from compresskit_kernels.grouped_dynamic_matmul import native
from compresskit_kernels.grouped_matmul.weight import GroupedWeight

if TYPE_CHECKING:
    import torch


def _rounded(x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    return round_rows(x, weight.group).dequantise()


OP: Op[GroupedWeight] = Op(
    "grouped_dynamic_matmul",
    (
        native.IMPLEMENTATION,
        on_cuda("grouped_dynamic_matmul", _rounded),
        reference("grouped_dynamic_matmul", _rounded),
    ),
)


def grouped_dynamic_matmul(
    x: torch.Tensor, weight: GroupedWeight, *, impl: str = "auto"
) -> torch.Tensor:
    """Multiply once; a model prepares the weight once instead and calls that."""
    return choose(OP, x, weight, impl).prepare(weight)(x)


__all__ = ["OP", "GroupedWeight", "grouped_dynamic_matmul"]
