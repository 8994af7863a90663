"""The formula in plain torch, float32 throughout. On a CPU this is the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit_kernels.activations import round_rows
from compresskit_kernels.dispatch import Use, note

if TYPE_CHECKING:
    from compresskit_kernels.activations import Rounded

ROUTINE = Use("norm_quantise", "reference: norm, round")


def supports(x: torch.Tensor) -> bool:
    """Anything that floats."""
    return x.is_floating_point()


def norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float) -> Rounded:
    """As `norm_quantise`."""
    note(ROUTINE)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).float()
    # The mean of no numbers would be NaN; there is nothing to norm.
    mean = rows.square().sum(dim=1, keepdim=True) / max(1, rows.shape[1])
    return round_rows(rows * torch.rsqrt(mean + eps) * (weight.float() + shift))
