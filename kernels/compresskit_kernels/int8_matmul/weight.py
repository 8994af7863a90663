"""The stored form of an int8 weight: plain codes and a scale per output row."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class Int8Weight(NamedTuple):
    """A weight `[N, K]` as `codes * scales[:, None]`."""

    codes: torch.Tensor
    """int8 `[N, K]`, -127 to 127."""
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

    def take(self, rows: torch.Tensor) -> Int8Weight:
        """These rows (int64 `[n]`), as a weight of their own."""
        return Int8Weight(self.codes[rows], self.scales[rows])

    @classmethod
    def join(cls, parts: Sequence[Int8Weight]) -> Int8Weight:
        """Stack weights of the same width on top of each other."""
        return cls(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]))
