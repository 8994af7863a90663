"""Attention over pieces of a cache that are made one after the other and never held together.

What goes from piece to piece is the running softmax: the largest score so far, the sum of the
weights, and the weighted values (Dao et al. 2022, FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


def attend(
    query: torch.Tensor,
    pieces: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    rows: int,
    scale: float,
) -> torch.Tensor:
    """Let queries `[B, H, T, D]`, the newest of `rows` tokens, attend to all that are not newer.

    `pieces` are keys and values, float32 `[B, K, n, D]`, in the order of the text. Returns
    `[B, T, H, D]` in the type of the queries.
    """
    batch, heads, new, width = query.shape
    out, top, total, first = None, None, None, 0
    for keys, values in pieces:
        kv_heads, size = keys.shape[1:3]
        # Query heads of one kv head become rows of one product.
        asked = query.float().reshape(batch, kv_heads, heads // kv_heads * new, width) * scale
        scores = asked @ keys.transpose(2, 3)
        newest = torch.arange(rows - new, rows, device=query.device).repeat(heads // kv_heads)
        at = torch.arange(first, first + size, device=query.device)
        scores = scores.masked_fill(at > newest.unsqueeze(1), -torch.inf)
        highest = scores.amax(-1, keepdim=True)
        if top is not None:
            highest = torch.maximum(top, highest)
        # The first piece has a row that every query sees, so nothing here is inf - inf.
        weights = torch.exp(scores - highest)
        added, weight = weights @ values, weights.sum(-1, keepdim=True)
        if out is None or total is None or top is None:
            out, total = added, weight
        else:
            kept = torch.exp(top - highest)
            out, total = out * kept + added, total * kept + weight
        top, first = highest, first + size
    if out is None or total is None:
        raise ValueError("attention over no pieces: a pass stores its own rows before it attends.")
    answer = (out / total).reshape(batch, heads, new, -1)
    return answer.transpose(1, 2).to(query.dtype)
