"""Activations rounded to int8 while they pass, the formula that every W*A8 product shares.

    steps[m, g] = max over the group of |x[m, k]| / 127
    codes[m, k] = round(x[m, k] / steps[m, g])             half to even; a zero group has step 0

One step a token, or one a token and group of G inputs. Rows never share a step, so a row's result
does not depend on the others in its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional


class Rounded(NamedTuple):
    """Rounded activations: x is about codes * steps."""

    codes: torch.Tensor
    """int8 `[M, K]`."""
    steps: torch.Tensor
    """float32 `[M, ceil(K / G)]`."""
    group: int
    """G."""

    def dequantise(self) -> torch.Tensor:
        """What the product sees, float32 `[M, K]`."""
        width = self.codes.shape[1]
        return self.codes.float() * self.steps.repeat_interleave(self.group, dim=1)[:, :width]


def round_rows(x: torch.Tensor, group: int | None = None) -> Rounded:
    """Round x `[M, K]`, with one step a row, or one every `group` inputs (a ragged last group)."""
    rows, width = x.shape
    size = width if group is None or group >= width else group
    if not width:
        return Rounded(x.to(torch.int8), x.new_zeros(rows, 0, dtype=torch.float32), 1)
    filled = functional.pad(x.float(), (0, -width % size)).view(rows, -(-width // size), size)
    steps = filled.abs().amax(dim=2) / 127
    codes = torch.round(filled / steps.where(steps > 0, 1.0).unsqueeze(2))
    return Rounded(codes.flatten(1)[:, :width].to(torch.int8), steps, size)
