"""Greedy continuations beside the baseline's: where do they part, and how often not at all?

A single different token sends two greedy texts apart for good, so `first_divergence` says more than
any similarity of the texts. It is fragile all the same: where two tokens are nearly tied, bfloat16
and float32 of one model part too.
"""

from __future__ import annotations

import hashlib
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from compresskit.record import GreedyComparison
from compresskit.spec import SamplingSpec
from compresskit.system import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.system import System


def first_divergence(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None if all are equal.

    Where one is the beginning of the other, they part where it ends.

    >>> first_divergence([1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6])
    2
    >>> first_divergence([1, 2], [1, 2, 3])
    2
    """
    same = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(ours, theirs, strict=False)))
    return None if same == len(ours) == len(theirs) else same


def compare(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], max_new_tokens: int
) -> GreedyComparison:
    """Compare the artefact's continuations with the baseline's, prompt by prompt."""
    parted = tuple(first_divergence(a, b) for a, b in zip(ours, theirs, strict=True))
    return GreedyComparison(
        prompts=len(parted),
        max_new_tokens=max_new_tokens,
        exact_match=parted.count(None) / len(parted),
        first_divergence=parted,
        length_ratio=sum(map(len, ours)) / sum(map(len, theirs)),
        outputs_sha256=tuple(map(_digest, ours)),
    )


def _digest(tokens: Sequence[int]) -> str:
    """First 16 hex digits: enough to tell two outputs apart."""
    return hashlib.sha256(repr(list(tokens)).encode()).hexdigest()[:16]


def continue_greedily(
    system: System, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Decode prompts of equal length as one batch, each until its stop token."""
    request = Request(
        tokens=torch.tensor([list(prompt) for prompt in prompts], device=system.device.torch),
        max_new_tokens=max_new_tokens,
        sampling=SamplingSpec(),
        stop=system.tokenizer.eos_ids,
    )
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in system.generate(request):
        for row, tokens, length in zip(
            rows, chunk.tokens.tolist(), chunk.lengths.tolist(), strict=True
        ):
            row.extend(tokens[:length])
    return rows
