"""The tensor cores' own product of 8-bit floats: `torch._scaled_mm` with a scale a row.

The operator wants codes `[M, K]` by rows times codes `[K, N]` by columns, K and N multiples of 16,
float32 scales `[M, 1]` and `[1, N]`, and gives bfloat16. Weights are padded once, at load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from compresskit_kernels.dispatch import Implementation, Prepared, Use, note
from compresskit_kernels.fp8_dynamic_matmul.rounding import round_rows

if TYPE_CHECKING:
    from compresskit_kernels.fp8_matmul.weight import Fp8Weight

MULTIPLE = 16
CAPABILITY = (8, 9)
"""Ada and Hopper are the first with 8-bit floats."""

SCALED = Use("fp8_dynamic_matmul", "cuda: torch._scaled_mm e4m3 x e4m3, row-wise")


class ScaledProduct(Prepared):
    """e4m3 codes padded to multiples of 16, and float32 scales."""

    __slots__ = ("codes", "height", "scales", "width")

    def __init__(self, weight: Fp8Weight) -> None:
        """Pad `weight`."""
        self.height, self.width = weight.shape
        down, right = -self.height % MULTIPLE, -self.width % MULTIPLE
        # Padding is defined for bytes on every device, and byte 0 is the number 0.
        padded = functional.pad(weight.codes.view(torch.uint8), (0, right, 0, down))
        self.codes = padded.contiguous().view(torch.float8_e4m3fn)
        self.scales = functional.pad(weight.scales.float(), (0, down)).unsqueeze(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`."""
        note(SCALED)
        flat = x.reshape(-1, self.width)
        if not flat.numel():
            return x.new_zeros((*x.shape[:-1], self.height))
        codes, steps = round_rows(functional.pad(flat, (0, -self.width % MULTIPLE)))
        y = torch._scaled_mm(
            codes,
            self.codes.t(),
            scale_a=steps,
            scale_b=self.scales,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y[:, : self.height].to(x.dtype).reshape(*x.shape[:-1], self.height)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight."""
        flat = index.reshape(-1)
        codes = self.codes.view(torch.uint8)[flat, : self.width].view(torch.float8_e4m3fn)
        return (codes.float() * self.scales[0, flat].unsqueeze(1)).view(*index.shape, -1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes, padding included, and scales."""
        return {"codes": self.codes, "scales": self.scales}


def _supports(x: torch.Tensor, weight: Fp8Weight) -> bool:
    return (
        x.is_cuda
        and x.is_floating_point()
        and weight.shape[1] > 0
        and torch.cuda.get_device_capability(x.device) >= CAPABILITY
    )


IMPLEMENTATION: Implementation[Fp8Weight] = Implementation(
    name="scaled",
    detail=SCALED.routine,
    needs="a floating-point input with K > 0 on a CUDA device of capability 8.9 or more",
    supports=_supports,
    prepare=ScaledProduct,
)
