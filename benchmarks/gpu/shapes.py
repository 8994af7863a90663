"""The shapes that are timed: layers of 1B to 8B models, caches of 4k to 128k tokens."""

from __future__ import annotations

from typing import NamedTuple

ROWS = (1, 4, 16, 64)
"""Tokens in flight for weight-only products: one user, a verification, small batches."""
MANY_ROWS = (16, 1024, 4096)
"""For products of 8-bit activations, which pay where the arithmetic is the limit."""

WEIGHTS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 2048))
"""(N, K): a projection, gate or up, down; gate of a 1B model."""
LARGE = ((4096, 4096), (14336, 4096), (8192, 8192))

TINY_ROWS = (1, 3)
TINY_WEIGHTS = ((64, 128),)


class Cache(NamedTuple):
    """A decoding step over a cache of 8 kv heads."""

    batch: int
    context: int
    queries: int
    width: int
    heads: int = 32
    kv_heads: int = 8


CACHES = (
    Cache(1, 4096, 1, 128),
    Cache(1, 32768, 1, 128),
    Cache(1, 32768, 4, 128),
    Cache(1, 32768, 1, 64),
    Cache(1, 131072, 1, 128),
    Cache(8, 8192, 1, 128),
    Cache(32, 4096, 1, 128),
)
TINY_CACHES = (Cache(2, 40, 2, 32, heads=4, kv_heads=2),)

APPENDED = ((1, 1), (1, 8), (32, 1))
"""(B, T) of new tokens."""

NORMED = ((1, 4096), (16, 4096), (1024, 4096), (4096, 8192))
"""(M, K)."""
TINY_NORMED = ((3, 64),)
