"""Our Triton kernels (`compresskit_kernels.packed`) for 8-bit codes with one scale a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.packed import product

if TYPE_CHECKING:
    from compresskit_kernels.dispatch import Prepared
    from compresskit_kernels.int8_matmul.weight import Int8Weight

ROUTINES = product.routines("int8_matmul", "int8 codes")


def prepare(weight: Int8Weight) -> Prepared:
    """Lay out a weight."""
    return product.by_row(weight, ROUTINES)
