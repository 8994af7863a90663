"""Our own product (`compresskit_kernels.native`): int8 codes times int8, four at a time (VNNI)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dispatch import Implementation, Use
from compresskit_kernels.native import product

if TYPE_CHECKING:
    import torch

    from compresskit_kernels.int8_matmul.weight import Int8Weight

FEW = Use("int8_dynamic_matmul", "native: int8 codes x int8")
ALL_ROWS = 1 << 62
"""The integer product leads at every number of rows."""


def _supports(x: torch.Tensor, weight: Int8Weight) -> bool:
    return product.supports(x) and weight.shape[1] <= product.LONGEST


IMPLEMENTATION: Implementation[Int8Weight] = Implementation(
    name="native",
    detail=FEW.routine,
    needs=product.NEEDS,
    supports=_supports,
    prepare=lambda weight: product.by_row(weight, (FEW, FEW), ALL_ROWS, integer=True),
)
