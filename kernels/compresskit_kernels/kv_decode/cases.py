"""Shapes, kinds and tolerances that every implementation of kv_decode is held to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from compresskit_kernels.kv_decode.cache import Kind


class Shape(NamedTuple):
    """Sizes of one case."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    slots: int
    width: int
    lengths: tuple[int, ...] | None = None
    """Filled slots per sequence; all if None."""


SHAPES: tuple[Shape, ...] = (
    Shape(1, 1, 1, 1, 1, 32),
    Shape(1, 4, 4, 1, 129, 64),
    Shape(2, 6, 2, 2, 41, 64, (41, 7)),
    Shape(2, 8, 1, 3, 100, 32, (99, 64)),
    Shape(1, 5, 1, 8, 67, 64, (67,)),
    Shape(3, 6, 3, 5, 70, 128, (70, 1, 33)),
)
"""Ones, primes, ratios of heads from 1 to 8, 1 to 8 queries, ragged lengths; in the last case a
sequence is shorter than its queries, so that some see nothing."""

KINDS: tuple[tuple[Kind, int, Kind, int], ...] = (
    ("int8", 1, "int8", 1),
    ("int4", 1, "int4", 1),
    ("int4", 2, "int4", 2),
    ("fp8", 1, "fp8", 1),
    ("int8", 1, "int4", 2),
)
"""Kind of the keys, their groups a row, kind of the values, their groups."""

RELATIVE_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest ‖y - y64‖ / ‖y64‖ by type of q, with y64 the formula in float64 on the same codes."""
