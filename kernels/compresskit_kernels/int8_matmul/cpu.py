"""The packed CPU path: torch's product of bfloat16 rows with int8 codes.

The operator reads the codes as they are stored, so nothing is repacked and nothing is kept twice;
only a width that is no multiple of 16 is padded, because the operator reads 16 codes at a time and
does not stop at the end of a row (wrong sums or a crash, torch 2.13).
It is fast in bfloat16 only (a float32 input falls into a scalar loop, about ten times slower than
a dense product), hence the casts. Its cost grows with every row, while turning the codes into
bfloat16 costs the same for any number of rows: beyond `PACKED_ROWS` the second wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from compresskit_kernels import host
from compresskit_kernels.dispatch import Implementation, Prepared, Use, note

if TYPE_CHECKING:
    from compresskit_kernels.int8_matmul.weight import Int8Weight

PACKED_ROWS = 16
"""Most rows for the packed product. Measured on one thread of a Zen 4 core (AVX-512): at 16 rows
packed leads 162 to 198 µs (1536x576) and 750 to 896 µs (2048x2048), at 32 rows it trails 317 to
260 and 1528 to 1185."""

STRIDE = 16
"""Codes that the operator reads at a time."""

CHUNK = 1 << 20
"""Codes turned into floats at a time: bounds the extra memory and stays in cache."""

PACKED = Use("int8_matmul", "cpu: _weight_int8pack_mm bf16")
WIDE = Use("int8_matmul", "cpu: codes to float + matmul")


class CpuInt8(Prepared):
    """Codes as stored, scales in bfloat16 (the operator takes no other type)."""

    __slots__ = ("codes", "height", "padding", "scales", "width")

    def __init__(self, weight: Int8Weight) -> None:
        """Keep the codes of `weight`; round the scales to bfloat16."""
        self.height, self.width = weight.shape
        self.padding = -self.width % STRIDE
        self.codes = functional.pad(weight.codes, (0, self.padding)).contiguous()
        self.scales = weight.scales.to(torch.bfloat16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`."""
        flat = x.reshape(-1, self.width)
        if self.padding:
            flat = functional.pad(flat, (0, self.padding))
        if flat.shape[0] <= PACKED_ROWS:
            note(PACKED)
            y = torch._weight_int8pack_mm(host.narrow(flat), self.codes, self.scales)
        else:
            note(WIDE)
            y = self._wide(flat)
        return host.like(y, x).view(*x.shape[:-1], self.height)

    def _wide(self, flat: torch.Tensor) -> torch.Tensor:
        """Codes are exact in bfloat16, so scaling the product instead of them loses nothing."""
        dtype = host.wide_dtype()
        flat = flat.to(dtype)
        step = max(1, CHUNK // self.codes.shape[1])
        parts = [
            functional.linear(flat, self.codes[i : i + step].to(dtype)) * self.scales[i : i + step]
            for i in range(0, self.height, step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight."""
        codes = self.codes[index][..., : self.width]
        return codes.float() * self.scales[index].float().unsqueeze(-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes and scales."""
        return {"codes": self.codes, "scales": self.scales}


def _supports(x: torch.Tensor, weight: Int8Weight) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[-1] > 0
        and host.has_int8_pack()
    )


IMPLEMENTATION: Implementation[Int8Weight] = Implementation(
    name="cpu",
    detail=f"{PACKED.routine} (M <= {PACKED_ROWS}), {WIDE.routine} (M > {PACKED_ROWS})",
    needs="a float32, bfloat16 or float16 input with K > 0 on an x86 CPU with AVX2 or AVX-512",
    supports=_supports,
    prepare=CpuInt8,
)
