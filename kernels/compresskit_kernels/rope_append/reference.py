"""The formula in plain torch: rotate in float32, quantise, write. On a CPU this is the product."""

from __future__ import annotations

import torch

from compresskit_kernels.dispatch import Use, note
from compresskit_kernels.kv_decode.cache import Rows, quantise

ROUTINE = Use("rope_append", "reference: rotate, quantise, write")


def supports(q: torch.Tensor, *_: object) -> bool:
    """Anything that floats."""
    return q.is_floating_point()


def append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Rows,
    values: Rows,
    starts: torch.Tensor,
) -> torch.Tensor:
    """As `rope_append`."""
    note(ROUTINE)
    slots = starts.to(q.device, torch.int64).unsqueeze(1) + torch.arange(
        q.shape[2], device=q.device
    )
    for side, rows in ((keys, rotate(k, cos, sin)), (values, v)):
        group = side.width // side.groups
        side.write(quantise(rows, side.kind, group=group, dtype=side.scales.dtype), slots)
    return rotate(q, cos, sin).to(q.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first P numbers of each row of x `[B, H, T, D]`; float32."""
    width = cos.shape[-1]
    x = x.float()
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    crossed = torch.cat((-second, first), dim=-1)
    turned = turned * cos.float().unsqueeze(1) + crossed * sin.float().unsqueeze(1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
