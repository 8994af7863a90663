"""Shapes and tolerances that every implementation of norm_quantise is held to."""

from __future__ import annotations

SHAPES: tuple[tuple[int, ...], ...] = ((1, 1), (3, 7), (2, 5, 64), (4, 576), (1, 1000), (2, 2049))
"""Of x: ones, odd widths, leading dimensions, just beyond a power of two."""

STEP_ERROR = 1e-6
"""Largest relative error of a step against float64."""
CODES_APART = 1
"""Largest difference of a code from float64, where a number lands between two codes."""
SHARE_APART = 2e-3
"""Largest share of such codes."""
