"""Rows in pages: appended without copying what is there, gathered whole pages at a time.

    rows      0 ... 15 | 16 ... 31 | 32 ... 38 | room for more
    pages        0           1           2

A tensor of rows is a view `[B, K, S, D]` of a buffer that has room behind them, for a sixteenth more.
A step then writes one row instead of copying all of them, as `torch.cat` does.
"""

from __future__ import annotations

import torch

ROOM = 16
"""A buffer that must grow gets room for one row in so many: 6 % of slack at most, besides a page."""


def capacity(held: torch.Tensor) -> int:
    """Rows that the buffer under `held` has place for; only its own if there is no such buffer."""
    batch, heads, rows, width = held.shape
    size = held.stride(1) // width
    storage = held.untyped_storage().nbytes() // held.element_size()
    whole = held.storage_offset() == 0 and storage == batch * heads * size * width
    ours = held.stride() == (heads * size * width, size * width, width, 1)
    return size if whole and ours else rows


def buffer(held: torch.Tensor) -> torch.Tensor:
    """All of the buffer under `held`: `[B, K, capacity, D]`; what lies behind the rows is undefined."""
    batch, heads, _, width = held.shape
    size = capacity(held)
    return held.as_strided(
        (batch, heads, size, width), (heads * size * width, size * width, width, 1)
    )


def extend(held: torch.Tensor | None, new: torch.Tensor, *, page: int) -> torch.Tensor:
    """`held` with rows `new` `[B, K, T, D]` behind it, in a buffer of whole pages.

    Writes into the buffer of `held` where there is room: whoever shares rows beyond its end with it
    sees them change.
    """
    new = new.detach()
    batch, heads, count, width = new.shape
    rows = 0 if held is None else held.shape[2]
    total = rows + count
    # torch writes to a tensor of inference mode in that mode only.
    frozen = held is not None and held.is_inference() and not torch.is_inference_mode_enabled()
    if held is None or frozen or capacity(held) < total or capacity(held) % page:
        size = -(-(total + total // ROOM) // page) * page
        grown = new.new_empty(batch, heads, size, width)
        if held is not None:
            grown[:, :, :rows] = held
    else:
        grown = buffer(held)
    grown[:, :, rows:total] = new
    return grown[:, :, :total]


def gather(held: torch.Tensor, pages: torch.Tensor, *, page: int) -> torch.Tensor:
    """Rows of `pages` `[B, K, n]`, one page after the other: a copy `[B, K, n * page, D]`.

    `held` is what `extend` returned. What lies behind the rows of an unfinished page is undefined.
    """
    batch, heads, _, width = held.shape
    whole = buffer(held)
    each = whole.shape[2] // page
    # A page of one head is one stretch of memory, so each is one copy.
    stretches = whole.view(batch * heads * each, page * width)
    first = torch.arange(0, batch * heads * each, each, device=pages.device).view(batch, heads, 1)
    chosen = stretches.index_select(0, (first + pages).flatten())
    return chosen.view(batch, heads, -1, width)
