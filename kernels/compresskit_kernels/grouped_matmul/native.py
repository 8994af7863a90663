"""Our own product (`compresskit_kernels.native`): real packed codes at every width, few rows or many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dispatch import Implementation, Use
from compresskit_kernels.native import product

if TYPE_CHECKING:
    import torch

    from compresskit_kernels.grouped_matmul.weight import GroupedWeight

FEW_ROWS = 32
"""Most rows for the packed product; beyond, spreading the codes and multiplying densely wins."""

FEW = Use("grouped_matmul", "native: packed codes x bf16")
MANY = Use("grouped_matmul", "native: codes to bf16 + matmul")


def _supports(x: torch.Tensor, weight: GroupedWeight) -> bool:
    return product.supports(x) and product.supports_grouped(weight)


IMPLEMENTATION: Implementation[GroupedWeight] = Implementation(
    name="native",
    detail=f"{FEW.routine} (M <= {FEW_ROWS}), {MANY.routine} (M > {FEW_ROWS})",
    needs=f"groups of a multiple of 32 inputs (16 with a code book), {product.NEEDS}",
    supports=_supports,
    prepare=lambda weight: product.grouped(weight, (FEW, MANY), FEW_ROWS),
)
