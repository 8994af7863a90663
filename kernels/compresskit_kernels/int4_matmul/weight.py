"""The stored form of a group-wise int4 weight: two codes a byte, a scale (and offset) per group.

    byte[n, j] = code[n, 2j] | code[n, 2j + 1] << 4        low nibble first
    weight[n, k] = (code[n, k] - 8) * scales[n, k // G] + offsets[n, k // G]

Rows are stored to a whole number of groups: a ragged last group is filled with codes that no
input ever meets. The layout is plain on purpose; what a fast path wants is made at load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class Int4Weight(NamedTuple):
    """A weight `[N, K]` in groups of G along K."""

    packed: torch.Tensor
    """uint8 `[N, ceil(K / G) * G / 2]`, two codes (0 to 15) a byte, low nibble first."""
    scales: torch.Tensor
    """`[N, ceil(K / G)]`, floating-point."""
    offsets: torch.Tensor | None
    """`[N, ceil(K / G)]`, the value of code 8; None when it is zero (symmetric)."""
    width: int
    """K."""
    group: int
    """G."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape[0], self.width

    def codes(self) -> torch.Tensor:
        """uint8 `[N, ceil(K / G) * G]`, padding included."""
        return torch.stack((self.packed & 15, self.packed >> 4), dim=-1).flatten(1)

    def dequantise(self) -> torch.Tensor:
        """The weight in float32, `[N, K]`."""
        rows, groups = self.scales.shape
        grouped = self.codes().view(rows, groups, self.group).float()
        weight = (grouped - 8) * self.scales.float().unsqueeze(2)
        if self.offsets is not None:
            weight = weight + self.offsets.float().unsqueeze(2)
        return weight.flatten(1)[:, : self.width]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by role."""
        held = {"packed": self.packed, "scales": self.scales}
        return held if self.offsets is None else {**held, "zero_points": self.offsets}

    @classmethod
    def join(cls, parts: Sequence[Int4Weight]) -> Int4Weight:
        """Stack weights of the same width and group on top of each other."""
        offsets = [p.offsets for p in parts if p.offsets is not None]
        return cls(
            torch.cat([p.packed for p in parts]),
            torch.cat([p.scales for p in parts]),
            torch.cat(offsets) if offsets else None,
            parts[0].width,
            parts[0].group,
        )


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Put two codes in a byte: integers 0 to 15, `[N, even]` -> uint8 `[N, even / 2]`."""
    codes = codes.to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4
