"""Shapes that every implementation of rope_append is held to; kinds as in `kv_decode.cases`."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one case."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    slots: int
    width: int
    starts: tuple[int, ...]


SHAPES: tuple[Shape, ...] = (
    Shape(1, 1, 1, 1, 1, 32, (0,)),
    Shape(2, 6, 2, 3, 20, 64, (3, 17)),
    Shape(1, 9, 3, 8, 11, 64, (0,)),
    Shape(3, 4, 1, 5, 13, 128, (8, 0, 2)),
)
"""One token and eight, ragged starts, the last slot."""

CODES_APART = 1
"""Largest difference of two implementations' codes, where a rotation lands between two of them."""
SHARE_APART = 2e-3
"""Largest share of such codes."""
