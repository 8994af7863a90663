"""Random numbers that follow from names: a seed and a step, or a seed and a row.

No state is carried from one step to the next, so a training that is resumed draws what the
uninterrupted one would have drawn, and a row draws the same in every batch.
"""

from __future__ import annotations

import hashlib

import torch


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """A generator (on the CPU) that depends on `purpose` and `numbers` alone."""
    return torch.Generator().manual_seed(number(purpose, *numbers))


def number(purpose: str, *numbers: int) -> int:
    """A seed below 2**63.

    Hashed, since seeds made by arithmetic meet: step 1 of seed 0 must not be step 0 of seed 1.
    """
    text = ":".join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
