"""oneDNN's int8 product, by way of torch's quantised linear: one layout for every number of rows.

Activations go in as unsigned codes around 128 with step 1, and their own steps are applied after:
the operator knows one step for all rows, which would couple them. Signed activations run a
reference path that is a thousand times slower, hence the detour (torch 2.13).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from compresskit_kernels.activations import round_rows
from compresskit_kernels.dispatch import Implementation, Prepared, Use, note

if TYPE_CHECKING:
    from compresskit_kernels.int8_matmul.weight import Int8Weight

PRODUCT = Use("int8_dynamic_matmul", "cpu: oneDNN u8 x s8")


class OneDnn(Prepared):
    """A weight laid out by oneDNN, and its scales."""

    __slots__ = ("height", "packed", "scales", "stored", "width", "zeros")

    def __init__(self, weight: Int8Weight) -> None:
        """Lay out the codes."""
        self.height, self.width = weight.shape
        self.packed = torch.ops.onednn.qlinear_prepack(weight.codes, [1, self.width])
        self.scales = weight.scales.float()
        self.zeros = torch.zeros(self.height, dtype=torch.int32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`."""
        note(PRODUCT)
        rounded = round_rows(x.reshape(-1, self.width))
        codes = (rounded.codes.to(torch.int16) + 128).to(torch.uint8)
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, self.packed, self.scales, self.zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        return (y * rounded.steps).to(x.dtype).view(*x.shape[:-1], self.height)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight, from the layout turned back."""
        dense: torch.Tensor = self.packed.to_dense()
        return dense.t()[index].float() * self.scales[index].unsqueeze(-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes in oneDNN's layout, scales, and the operator's zero points."""
        return {"packed": self.packed, "scales": self.scales, "zero_points": self.zeros}


@functools.cache
def _works() -> bool:
    """Try the private operators on a small product."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return False
    codes = torch.arange(-16, 16, dtype=torch.int8).view(2, 16)
    try:
        packed = torch.ops.onednn.qlinear_prepack(codes, [1, 16])
        got = torch.ops.onednn.qlinear_pointwise(
            torch.full((1, 16), 129, dtype=torch.uint8), 1.0, 128, packed, torch.ones(2),
            torch.zeros(2, dtype=torch.int32), None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
    except RuntimeError:  # no oneDNN in this build, or an instruction set without it
        return False
    return torch.equal(got, codes.float().sum(dim=1).unsqueeze(0))


def _supports(x: torch.Tensor, weight: Int8Weight) -> bool:
    return (
        x.device.type == "cpu"
        and x.is_floating_point()
        and min(weight.shape) > 0
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and _works()
    )


IMPLEMENTATION: Implementation[Int8Weight] = Implementation(
    name="cpu",
    detail=PRODUCT.routine,
    needs="a floating-point input and a weight that is not empty on an x86 CPU with oneDNN",
    supports=_supports,
    prepare=OneDnn,
)
