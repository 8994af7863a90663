"""Our Triton kernels (`compresskit_kernels.packed`) for group-wise weights of 2 to 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.packed import product

if TYPE_CHECKING:
    from compresskit_kernels.dispatch import Prepared
    from compresskit_kernels.grouped_matmul.weight import GroupedWeight

ROUTINES = product.routines("grouped_matmul", "packed codes")


def prepare(weight: GroupedWeight) -> Prepared:
    """Lay out a weight."""
    return product.grouped(weight, ROUTINES)
