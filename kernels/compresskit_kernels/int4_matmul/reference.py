"""The formula in plain torch: dequantise to float32, multiply in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from compresskit_kernels.dispatch import Implementation, Prepared, Use, note

if TYPE_CHECKING:
    import torch

    from compresskit_kernels.int4_matmul.weight import Int4Weight

ROUTINE = Use("int4_matmul", "reference: dequantise float32")


class Reference(Prepared):
    """Keeps the stored form; pays for the dequantisation in every call."""

    __slots__ = ("weight",)

    def __init__(self, weight: Int4Weight) -> None:
        """Keep `weight` as it is."""
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]` in float32; return the type of x."""
        note(ROUTINE)
        return functional.linear(x.float(), self.weight.dequantise()).to(x.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors."""
        return self.weight.tensors()


IMPLEMENTATION: Implementation[Int4Weight] = Implementation(
    name="reference",
    detail=ROUTINE.routine,
    needs="a floating-point input",
    supports=lambda x: x.is_floating_point(),
    prepare=Reference,
)
