"""The part of the training rows that makers look at.

Means over some thousands of tokens hardly move with more of them, and a maker should take seconds of
the training that follows, not minutes.
"""

from __future__ import annotations

import torch

from compresskit.errors import InputError

TOKENS = 8192
"""Tokens to look at, at most."""
AT_ONCE = 4096
"""Tokens of one forward pass: what bounds memory."""


def batches(rows: torch.Tensor) -> list[torch.Tensor]:
    """Evenly spread rows of `rows` `[R, L]`, in batches of a size that fits into memory.

    Raises:
        InputError: there are none.
    """
    if rows.dim() != 2 or not rows.numel():
        raise InputError(
            "a student that is cut by what its teacher does with text needs some: there are no rows. "
            "Name a text, or use a choice that needs none."
        )
    count, length = rows.shape
    wanted = max(1, min(count, TOKENS // length))
    chosen = rows[[place * count // wanted for place in range(wanted)]]
    return list(torch.split(chosen, max(1, AT_ONCE // length)))
