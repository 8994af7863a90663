"""Our own product (`compresskit_kernels.native`): unsigned codes times int8, four at a time (VNNI)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dispatch import Implementation, Use
from compresskit_kernels.native import product

if TYPE_CHECKING:
    import torch

    from compresskit_kernels.grouped_matmul.weight import GroupedWeight

FEW = Use("grouped_dynamic_matmul", "native: packed codes x int8")
ALL_ROWS = 1 << 62
"""The integer product leads at every number of rows."""


def _supports(x: torch.Tensor, weight: GroupedWeight) -> bool:
    return product.supports(x) and product.supports_grouped(weight, integer=True)


IMPLEMENTATION: Implementation[GroupedWeight] = Implementation(
    name="native",
    detail=FEW.routine,
    needs=f"groups of a multiple of 32 inputs without a code book, {product.NEEDS}",
    supports=_supports,
    prepare=lambda weight: product.grouped(weight, (FEW, FEW), ALL_ROWS, integer=True),
)
