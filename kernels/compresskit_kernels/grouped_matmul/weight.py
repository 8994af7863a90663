"""The stored form of a group-wise weight of 2 to 8 bits: a stream of codes, and a grid per group.

    level[n, k] = code[n, k] - 2^(bits - 1)      symmetric, or with offsets
                  code[n, k] - zeros[n, k // G]  with integer zero points
                  table[code[n, k]]              with a code book (nf4, fp4, mxfp4, ...)
    weight[n, k] = gain * level[n, k] * scales[n, k // G] + offsets[n, k // G]

The codes are packed as in `packing`, K of them a row; a ragged last group is simply shorter. The
layout is plain on purpose; what a fast path wants is made at load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from compresskit_kernels.packing import unpack

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class GroupedWeight:
    """A weight `[N, K]` in groups of G along K."""

    packed: torch.Tensor
    """uint8 `[N, ceil(K * bits / 32) * 4]`."""
    scales: torch.Tensor
    """`[N, ceil(K / G)]`, floating-point (bfloat16 unless a format wants otherwise)."""
    width: int
    """K."""
    group: int
    """G, a multiple of 16; at least K means one group a row."""
    bits: int = 4
    offsets: torch.Tensor | None = None
    """`[N, ceil(K / G)]`, the value of the middle code 2^(bits - 1); excludes zeros and table."""
    zeros: torch.Tensor | None = None
    """uint8 `[N, ceil(K / G)]`, the code that means zero; excludes offsets and table."""
    table: tuple[float, ...] | None = None
    """2^bits levels (bits at most 5, each exact in bfloat16); excludes offsets and zeros."""
    gain: float = 1.0
    """One factor for the whole weight (the second scale of nvfp4)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape[0], self.width

    @property
    def groups(self) -> int:
        """Groups a row."""
        return -(-self.width // self.group)

    def codes(self) -> torch.Tensor:
        """uint8 `[N, K]`."""
        return unpack(self.packed, self.bits, self.width)

    def levels(self) -> torch.Tensor:
        """The codes' values before scaling, float32 `[N, K]`."""
        codes = self.codes()
        if self.table is not None:
            book = torch.tensor(self.table, dtype=torch.float32, device=codes.device)
            levels: torch.Tensor = book[codes.long()]
            return levels
        middle: torch.Tensor | int = 2 ** (self.bits - 1)
        if self.zeros is not None:
            middle = self.spread(self.zeros.float())
        return codes.float() - middle

    def dequantise(self) -> torch.Tensor:
        """The weight in float32, `[N, K]`."""
        weight = self.levels() * self.spread(self.scales.float())
        if self.gain != 1.0:
            weight = weight * self.gain
        return weight if self.offsets is None else weight + self.spread(self.offsets.float())

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """One value a group `[N, ceil(K / G)]` -> one a weight `[N, K]`."""
        size = min(self.group, max(1, self.width))
        spread: torch.Tensor = values.repeat_interleave(size, dim=1)[:, : self.width]
        return spread

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by role."""
        held = {"packed": self.packed, "scales": self.scales}
        extra = self.offsets if self.offsets is not None else self.zeros
        return held if extra is None else {**held, "zero_points": extra}

    def take(self, rows: torch.Tensor) -> GroupedWeight:
        """These rows (int64 `[n]`), as a weight of their own."""
        return replace(
            self,
            packed=self.packed[rows],
            scales=self.scales[rows],
            offsets=None if self.offsets is None else self.offsets[rows],
            zeros=None if self.zeros is None else self.zeros[rows],
        )

    @classmethod
    def join(cls, parts: Sequence[GroupedWeight]) -> GroupedWeight:
        """Stack weights of the same kind on top of each other."""
        first = parts[0]
        offsets = [p.offsets for p in parts if p.offsets is not None]
        zeros = [p.zeros for p in parts if p.zeros is not None]
        return replace(
            first,
            packed=torch.cat([p.packed for p in parts]),
            scales=torch.cat([p.scales for p in parts]),
            offsets=torch.cat(offsets) if offsets else None,
            zeros=torch.cat(zeros) if zeros else None,
        )
