"""The stored form of an 8-bit floating-point weight: e4m3 numbers and a scale per output row.

weight[n, k] = codes[n, k] * scales[n]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGEST = 448.0
"""Largest finite e4m3 number (the `fn` variant has no infinity)."""


class Fp8Weight(NamedTuple):
    """A weight `[N, K]`."""

    codes: torch.Tensor
    """float8_e4m3fn `[N, K]`, finite."""
    scales: torch.Tensor
    """`[N]`, floating-point."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, width = self.codes.shape
        return rows, width

    def dequantise(self) -> torch.Tensor:
        """The weight in float32, `[N, K]`."""
        return self.codes.float() * self.scales.float().unsqueeze(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by role."""
        return {"codes": self.codes, "scales": self.scales}

    def take(self, rows: torch.Tensor) -> Fp8Weight:
        """These rows (int64 `[n]`), as a weight of their own."""
        codes = self.codes.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        return Fp8Weight(codes, self.scales[rows])

    @classmethod
    def join(cls, parts: Sequence[Fp8Weight]) -> Fp8Weight:
        """Stack weights of the same width on top of each other."""
        codes = torch.cat([p.codes.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn)
        return cls(codes, torch.cat([p.scales for p in parts]))
