"""Activations rounded to e4m3 while they pass: one step a token.

steps[m] = max_k |x[m, k]| / 448
codes[m, k] = e4m3(x[m, k] / steps[m])        nearest, ties to even; a zero row has step 0
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compresskit_kernels.fp8_matmul.weight import LARGEST


class Rounded(NamedTuple):
    """Rounded activations: x is about codes * steps."""

    codes: torch.Tensor
    """float8_e4m3fn `[M, K]`."""
    steps: torch.Tensor
    """float32 `[M, 1]`."""

    def dequantise(self) -> torch.Tensor:
        """What the product sees, float32 `[M, K]`."""
        return self.codes.float() * self.steps


def round_rows(x: torch.Tensor) -> Rounded:
    """Round x `[M, K]`.

    Clamped before the cast: a quotient may come out a hair above 448, and torch versions differ in
    whether that saturates or becomes NaN.
    """
    rows, width = x.shape
    if not width:
        return Rounded(x.to(torch.float8_e4m3fn), x.new_zeros(rows, 1, dtype=torch.float32))
    x = x.float()
    steps = x.abs().amax(dim=1, keepdim=True) / LARGEST
    codes = (x / steps.where(steps > 0, 1.0)).clamp(-LARGEST, LARGEST)
    return Rounded(codes.to(torch.float8_e4m3fn), steps)
