"""Attention as a score of rows: probabilities of some queries, never of all of them at once.

    probabilities   query [B, H, W, D], keys [B, K, S, D]   ──►   [B, H, W, S]
    column_sums     the same for many queries, summed over them in blocks   ──►   [B, H, S]
    reduce_heads    H query heads to the K key/value heads that they share
    pool            each row's score and its neighbours', so that words stay whole

Queries are the newest ones of the rows: the last query sees every row, the one before it all but the
newest row, and so on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, assert_never

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

Reduction = Literal["mean", "max", "sum"]
Pooling = Literal["avg", "max"]

BLOCK_NUMBERS = 2**23
"""Probabilities that `column_sums` holds at a time (32 MiB): independent of the prompt's length."""


def probabilities(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of the newest W queries over S rows: float32 `[B, H, W, S]`.

    Products are taken in the type of the model and the soft-max in float32, as eager attention does.

    Args:
        query: `[B, H, W, D]`, those of the last W rows.
        keys: `[B, K, S, D]`; K divides H, and head h reads keys h // (H / K).
        scale: factor of the products.
    """
    batch, heads, new, width = query.shape
    shared, rows = keys.shape[1], keys.shape[2]
    # The queries of a group are rows of one product, so that no key is repeated.
    grouped = query.reshape(batch, shared, heads // shared * new, width)
    scores = (grouped @ keys.transpose(-1, -2)).float().mul_(scale)
    scores = scores.view(batch, heads, new, rows)
    if new > 1:
        later = torch.ones(new, rows, dtype=torch.bool, device=keys.device).triu(rows - new + 1)
        scores = scores.masked_fill_(later, -torch.inf)
    return scores.softmax(dim=-1)


def column_sums(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention that each row gets from all T queries together: float32 `[B, H, S]`.

    Shapes as in `probabilities`. Memory grows with S, not with T * S.
    """
    batch, heads, new, _ = query.shape
    rows = keys.shape[2]
    total = torch.zeros(batch, heads, rows, device=keys.device)
    for start, stop in _blocks(new, max(BLOCK_NUMBERS // (batch * heads * rows), 1)):
        seen = rows - new + stop
        part = probabilities(query[:, :, start:stop], keys[:, :, :seen], scale)
        total[..., :seen] += part.sum(dim=-2)
    return total


def _blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, size):
        yield start, min(start + size, length)


def reduce_heads(scores: torch.Tensor, shared: int, how: Reduction) -> torch.Tensor:
    """One score for each of `shared` key/value heads: `[B, H, S]` to `[B, K, S]`.

    `max` keeps a row that a single query head of the group needs; `mean` may lose it.
    """
    batch, _, rows = scores.shape
    groups = scores.reshape(batch, shared, -1, rows)
    if how == "mean":
        return groups.mean(dim=2)
    if how == "max":
        return groups.amax(dim=2)
    if how == "sum":
        return groups.sum(dim=2)
    assert_never(how)


def pool(scores: torch.Tensor, kernel: int, how: Pooling) -> torch.Tensor:
    """Mean or maximum of each score of `[B, H, S]` and its neighbours, `kernel` (odd) in all.

    Beyond the ends the mean takes zeros, as Li et al. 2024 (SnapKV, arXiv 2404.14469) do.
    """
    if how == "avg":
        return functional.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    if how == "max":
        return functional.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    assert_never(how)
