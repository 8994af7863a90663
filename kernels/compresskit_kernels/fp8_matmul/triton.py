"""Our Triton kernels (`compresskit_kernels.packed`) for e4m3 numbers with one scale a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.packed import product

if TYPE_CHECKING:
    from compresskit_kernels.dispatch import Prepared
    from compresskit_kernels.fp8_matmul.weight import Fp8Weight

ROUTINES = product.routines("fp8_matmul", "e4m3 codes")


def prepare(weight: Fp8Weight) -> Prepared:
    """Lay out a weight."""
    return product.float8(weight, ROUTINES)
