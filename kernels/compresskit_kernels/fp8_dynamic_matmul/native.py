"""The numbers of the op on a CPU: rounded codes, as floats, into our own e4m3 product.

No CPU of ours multiplies 8-bit floats, so this is as fast as the weight-only product at best; it
makes the quality of the scheme measurable at a bearable pace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dispatch import Implementation, Prepared, Use
from compresskit_kernels.fp8_dynamic_matmul.rounding import round_rows
from compresskit_kernels.native import product

if TYPE_CHECKING:
    import torch

    from compresskit_kernels.fp8_matmul.weight import Fp8Weight

FEW_ROWS = 16
"""As in `fp8_matmul.native`."""

FEW = Use("fp8_dynamic_matmul", "native: e4m3 codes as floats x e4m3")
MANY = Use("fp8_dynamic_matmul", "native: codes to bf16 + matmul")


class RoundedFloat8(Prepared):
    """Multiplies codes by codes, both exact in bfloat16, and the steps afterwards."""

    __slots__ = ("product",)

    def __init__(self, weight: Fp8Weight) -> None:
        """Lay out `weight`."""
        self.product = product.float8(weight, (FEW, MANY), FEW_ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`."""
        codes, steps = round_rows(x.reshape(-1, x.shape[-1]))
        y = self.product(codes.float()) * steps
        return y.to(x.dtype).view(*x.shape[:-1], self.product.height)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight."""
        return self.product.rows(index)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes and scales."""
        return self.product.tensors()


def _supports(x: torch.Tensor, _: Fp8Weight) -> bool:
    return product.supports(x)


IMPLEMENTATION: Implementation[Fp8Weight] = Implementation(
    name="native",
    detail=f"{FEW.routine} (M <= {FEW_ROWS}), {MANY.routine} (M > {FEW_ROWS})",
    needs=product.NEEDS,
    supports=_supports,
    prepare=RoundedFloat8,
)
