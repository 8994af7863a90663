"""The 4-bit path of torch: its product of bfloat16 rows with packed int4 codes.

Where our own product (`native`) cannot be built, this is what runs.

The operator wants its own layout, which follows the instruction set (`host.int4_block`), so the
stored codes are repacked at load and then dropped; it is never serialised. It is fast in bfloat16
only, hence the casts. Its cost grows with every row; with more than `PACKED_ROWS` rows the packed
codes are turned back into bfloat16, a slab at a time, and multiplied densely.

Rows are padded to `host.ROWS` and a ragged last group is completed, both counted in `held_bytes`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from compresskit_kernels import host
from compresskit_kernels.dispatch import Implementation, Prepared, Use, note

if TYPE_CHECKING:
    from compresskit_kernels.grouped_matmul.weight import GroupedWeight

PACKED_ROWS = 64
"""Most rows for the packed product. Measured on one thread of a Zen 4 core (AVX-512), 1536x576:
packed 322 µs at 32 rows and 626 at 64; unpacking costs 448, the product after it 260 at 64."""

GROUPS = (32, 64, 128, 256)

CHUNK = 1 << 19
"""Codes unpacked at a time: bounds the extra memory and stays in cache."""

PACKED = Use("grouped_matmul", "cpu: _weight_int4pack_mm_for_cpu bf16")
WIDE = Use("grouped_matmul", "cpu: unpack to float + matmul")


class TorchInt4(Prepared):
    """torch's packed codes and one tensor of scales and offsets."""

    __slots__ = ("block", "group", "height", "packed", "padded_width", "qparams", "width")

    def __init__(self, weight: GroupedWeight) -> None:
        """Repack `weight`; scales and offsets are rounded to bfloat16 unless they are already."""
        block = host.int4_block()
        if block is None:
            raise ValueError(
                "grouped_matmul: this CPU has no packed int4 product; use 'reference'."
            )
        self.block = block
        self.height, self.width = weight.shape
        self.group = weight.group
        self.padded_width = weight.groups * weight.group
        self.packed = _repack(weight, self.padded_width)
        both = torch.stack((weight.scales, _offsets(weight)), dim=-1).to(torch.bfloat16)
        both = functional.pad(both, (0, 0, 0, 0, 0, -self.height % host.ROWS))
        self.qparams = both.transpose(0, 1).contiguous()  # [K/G, N, 2]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`."""
        flat = x.reshape(-1, self.width)
        if self.padded_width != self.width:
            flat = functional.pad(flat, (0, self.padded_width - self.width))
        if flat.shape[0] <= PACKED_ROWS:
            note(PACKED)
            y = torch._weight_int4pack_mm_for_cpu(
                host.narrow(flat), self.packed, self.group, self.qparams
            )
        else:
            note(WIDE)
            y = self._wide(flat)
        if y.shape[1] != self.height:
            y = y[:, : self.height]
        return host.like(y, x).reshape(*x.shape[:-1], self.height)

    def _wide(self, flat: torch.Tensor) -> torch.Tensor:
        """Unpack a slab of rows, multiply, go on."""
        flat = flat.to(host.wide_dtype())
        total = self.packed.shape[0]
        step = max(host.ROWS, CHUNK // self.padded_width // host.ROWS * host.ROWS)
        parts = [flat @ self._unpack(i, min(i + step, total)) for i in range(0, total, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _unpack(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop, transposed: `[K, stop - start]` in the wide type.

        Scaled in float32 (torch's elementwise bfloat16 is slower) and in the packed order, where
        neighbouring numbers are rows of one block.
        """
        block, width = self.block, self.padded_width
        blocks, groups = (stop - start) // block, width // self.group
        qparams = self.qparams[:, start:stop].float().view(groups, blocks, block, 2)
        qparams = qparams.permute(1, 0, 3, 2).contiguous()  # [blocks, K/G, 2, block]
        scales = qparams[:, :, :1]
        base = qparams[:, :, 1:] - 8 * scales
        codes = host.int4_codes(self.packed[start:stop], block).float()
        values = codes.view(blocks, groups, self.group, block).mul_(scales).add_(base)
        out = torch.empty(width, blocks, block, dtype=host.wide_dtype())
        out.permute(1, 0, 2).copy_(values.view(blocks, width, block))
        return out.view(width, stop - start)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight; a block is unpacked for each."""
        flat = index.reshape(-1)
        block = host.ROWS
        out = torch.empty(flat.numel(), self.width)
        for place, row in enumerate(flat.tolist()):
            start = row // block * block
            out[place] = self._unpack(start, start + block)[: self.width, row - start]
        return out.view(*index.shape, self.width)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Packed codes, and scales with offsets."""
        return {"packed": self.packed, "qparams": self.qparams}

    def held_bytes(self) -> dict[str, int]:
        """Scales and offsets lie side by side in one tensor; symmetric weights hold offsets of 0."""
        half = self.qparams.nbytes // 2
        return {"packed": self.packed.nbytes, "scales": half, "zero_points": half}


def _offsets(weight: GroupedWeight) -> torch.Tensor:
    """The value of code 8, which is where torch's grid has its origin."""
    if weight.zeros is not None:
        return (8 - weight.zeros.float()) * weight.scales.float()
    return torch.zeros_like(weight.scales) if weight.offsets is None else weight.offsets


def _repack(weight: GroupedWeight, width: int) -> torch.Tensor:
    """Lay the codes out as torch wants them: padded rows, and by way of int32, so in slabs."""
    rows = weight.shape[0]
    out = torch.zeros(rows + -rows % host.ROWS, width // 2, dtype=torch.uint8)
    step = max(host.ROWS, CHUNK // max(1, width) // host.ROWS * host.ROWS)
    for start in range(0, rows, step):
        part = replace(weight, packed=weight.packed[start : start + step]).codes().int()
        part = functional.pad(part, (0, width - weight.width, 0, -part.shape[0] % host.ROWS))
        out[start : start + part.shape[0]] = torch._convert_weight_to_int4pack_for_cpu(part, 1)
    return out


def _supports(x: torch.Tensor, weight: GroupedWeight) -> bool:
    return (
        weight.bits == 4
        and weight.group in GROUPS
        and weight.table is None
        and weight.gain == 1.0
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[-1] > 0
        and host.int4_block() is not None
    )


IMPLEMENTATION: Implementation[GroupedWeight] = Implementation(
    name="cpu",
    detail=f"{PACKED.routine} (M <= {PACKED_ROWS}), {WIDE.routine} (M > {PACKED_ROWS})",
    needs="an affine 4-bit weight in groups of 32 to 256, and a float32, bfloat16 or float16 input "
    "with K > 0 on an x86 CPU with AVX2 or AVX-512",
    supports=_supports,
    prepare=TorchInt4,
)
