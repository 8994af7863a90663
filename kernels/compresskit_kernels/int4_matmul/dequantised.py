"""Dequantise to the type of x and multiply: the path of devices without a kernel of ours (CUDA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from compresskit_kernels.dispatch import Implementation, Prepared, Use, note

if TYPE_CHECKING:
    import torch

    from compresskit_kernels.int4_matmul.weight import Int4Weight

ROUTINE = Use("int4_matmul", "cuda: torch dequantise + matmul")


class Dequantised(Prepared):
    """Keeps the stored form; pays for the dequantisation in every call."""

    __slots__ = ("weight",)

    def __init__(self, weight: Int4Weight) -> None:
        """Keep `weight` as it is."""
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]` in its own type; the product accumulates in float32."""
        note(ROUTINE)
        return functional.linear(x, self.weight.dequantise().to(x.dtype))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors."""
        return self.weight.tensors()


IMPLEMENTATION: Implementation[Int4Weight] = Implementation(
    name="dequantised",
    detail=ROUTINE.routine,
    needs="a floating-point input on a CUDA device",
    supports=lambda x: x.is_cuda and x.is_floating_point(),
    prepare=Dequantised,
)
