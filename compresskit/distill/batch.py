"""What goes into one training step: rows of tokens, and what the teacher says about them.

Positions are counted once, everywhere: the `N = B * (L - 1)` places of a batch whose next token is
known, row after row. Place `n` reads token `l` of its row and is asked for token `l + 1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn


@dataclass(frozen=True)
class Batch:
    """Rows that are learned together."""

    tokens: torch.Tensor
    """int64 `[B, L]`."""
    weights: torch.Tensor
    """float32 `[B, L]`: weight of each token in the loss, as the token to be predicted; 0 leaves it
    out. The first of a row is never predicted."""
    rows: torch.Tensor
    """int64 `[B]`: numbers of the rows in the data; -1 for a row that is not from there."""

    def labels(self) -> torch.Tensor:
        """int64 `[N]`: the token that each place is asked for."""
        return self.tokens[:, 1:].flatten()

    def label_weights(self) -> torch.Tensor:
        """float32 `[N]`: how much each place counts."""
        return self.weights[:, 1:].flatten()


class Dense(NamedTuple):
    """The teacher's whole distribution, kept as what its head reads: logits are made chunk by chunk."""

    hidden: torch.Tensor
    """`[N, E]`: hidden states under the logits."""
    head: nn.Module
    """Turns `[n, E]` into logits `[n, V]`; no gradient is wanted."""
    states: Mapping[int, torch.Tensor]
    """Hidden states `[N, E]` behind the blocks that a hidden-state loss asked for, by block number."""


class TopK(NamedTuple):
    """The teacher's likeliest tokens, and what is left for all others together."""

    ids: torch.Tensor
    """int64 `[N, K]`, no token twice in a place."""
    logprobs: torch.Tensor
    """float32 `[N, K]`."""
    rest: torch.Tensor
    """float32 `[N]`: log of the probability of all other tokens; -inf where none is left."""


class Draws(NamedTuple):
    """Tokens drawn from the teacher with weights that make every sum over them unbiased.

    For any f, the expected value of `sum_k weights[n, k] * f(ids[n, k])` is the teacher's expectation
    of f at place n. A token drawn several times may stand once with a larger weight; unused entries
    have weight 0.
    """

    ids: torch.Tensor
    """int64 `[N, K]`."""
    weights: torch.Tensor
    """float32 `[N, K]`."""


Target = Dense | TopK | Draws
