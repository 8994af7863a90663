"""The formula in plain torch, float32 throughout, a stretch of the cache at a time.

A stretch is dequantised, attended to and dropped; what is kept is the running softmax (its largest
score, its sum and the weighted values), so no full-precision copy of the cache ever exists. On a
CPU this is the product.
"""

from __future__ import annotations

import math

import torch

from compresskit_kernels.dispatch import Use, note
from compresskit_kernels.kv_decode.cache import Rows, quantise

STRETCH = 1024
"""Slots at a time: 8 heads of 128 in float32 are 4 MiB, about what a core's caches hold."""

EXTEND = Use("kv_extend", "reference: quantise and concatenate")
ROUTINE = Use("kv_decode", "reference: dequantise by stretches, float32")


def supports(q: torch.Tensor, *_: object) -> bool:
    """Anything that floats."""
    return q.is_floating_point()


def attend(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """As `kv_decode`."""
    note(ROUTINE)
    batch, heads, queries, width = q.shape
    kv_heads, slots = keys.codes.shape[1], keys.slots
    if lengths is None:
        lengths = torch.full((batch,), slots, device=q.device)
    # Query heads of one kv head become rows of one product: row = head in the group * Q + query.
    rows = q.float().reshape(batch, kv_heads, heads // kv_heads * queries, width) * scale
    newest = torch.arange(queries, device=q.device).repeat(heads // kv_heads)
    last = lengths.to(q.device).unsqueeze(1) - queries + newest  # [B, rows]: newest slot it sees

    top = rows.new_full(rows.shape[:3], -torch.inf)
    total = torch.zeros_like(top)
    out = torch.zeros_like(rows)
    together = math.lcm(keys.span, values.span)
    stretch = max(1, STRETCH // together) * together
    for start in range(0, slots, stretch):
        stop = min(start + stretch, slots)
        at = torch.arange(start, stop, device=q.device)
        seen = at <= last.unsqueeze(2)
        if mask is not None:
            seen = seen & mask[:, None, start:stop]
        # Looking costs nothing on a CPU; elsewhere it would wait for the device.
        looked = q.device.type == "cpu"
        if looked and not seen.any():
            continue
        whole = looked and bool(seen.all())
        seen = seen.unsqueeze(1)  # [B, 1, rows, stretch]
        scores = rows @ keys.between(start, stop).dequantise().transpose(2, 3)
        if not whole:
            scores = scores.masked_fill(~seen, -torch.inf)
        higher = torch.maximum(top, scores.amax(-1))
        # A row that has seen nothing yet has -inf on both sides of the differences below.
        level = higher.masked_fill(higher == -torch.inf, 0.0)
        kept = torch.exp(top - level)
        weights = torch.exp(scores - level.unsqueeze(-1))
        used = values.between(start, stop).dequantise()
        if not whole:  # slots that no query sees may hold anything, NaN included
            used = used.masked_fill(~seen.any(dim=2).unsqueeze(-1), 0.0)
        out = out * kept.unsqueeze(-1) + weights @ used
        total = total * kept + weights.sum(-1)
        top = higher
    out = out / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out.reshape(q.shape).to(q.dtype)


def extend(old: Rows, x: torch.Tensor, group: int) -> Rows:
    """As `kv_extend`."""
    note(EXTEND)
    new = quantise(x, old.kind, group=group, dtype=old.scales.dtype)
    pairs = zip(old.tensors().values(), new.tensors().values(), strict=True)
    return Rows.of(old.kind, (torch.cat(pair, dim=2) for pair in pairs))
