"""Rows judged by the newest queries: what SnapKV and PyramidKV share.

rows      0 1 2 ............ S-W-1 | S-W ... S-1
          scored                   | the window: always kept, its queries are the judges

score[s] = reduce over the group's heads ( pool ( mean over the judges ( attention to s )))
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from compresskit.errors import RunError
from compresskit.hf.cache import KEYS_VALUES, TOKENS
from compresskit.methods.kv._evict import Evict, EvictingLayer, Rule
from compresskit.methods.kv._scores import Pooling, Reduction, pool, probabilities, reduce_heads

if TYPE_CHECKING:
    from compresskit.hf.attention import Call
    from compresskit.hf.rotary import Rotary


def judge(
    query: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    *,
    kernel: int,
    pooling: Pooling,
    heads: Reduction,
) -> torch.Tensor:
    """Scores `[B, K, S - W]` of all rows but the newest W, by the queries `[B, H, W, D]` of those."""
    window = query.shape[TOKENS]
    attention = probabilities(query, keys, scale)[..., :-window].mean(dim=-2)
    return reduce_heads(pool(attention, kernel, pooling), keys.shape[1], heads)


class JudgedLayer(EvictingLayer):
    """Keeps the newest `window` rows and what their queries look at.

    Where rows are dropped while decoding, the judges come from several passes: their queries are
    held too, and counted.
    """

    tensors = ("keys", "values", "queries")
    holds = MappingProxyType({**KEYS_VALUES, "queries": "index"})
    watches = True

    queries: torch.Tensor | None

    def __init__(
        self, rule: Rule, *, window: int, kernel: int, pooling: Pooling, heads: Reduction
    ) -> None:
        """Hold nothing yet."""
        super().__init__(rule)
        self.window, self.kernel, self.pooling, self.heads = window, kernel, pooling, heads

    def attend(self, call: Call) -> torch.Tensor:
        """Attend; then drop what the newest queries do not look at."""
        if self.rule.hold:
            newest = call.query[..., -self.window :, :]
            known = newest if self.queries is None else torch.cat((self.queries, newest), TOKENS)
            # A copy: a slice would keep the queries of the whole prompt alive.
            self.queries = known[..., -self.window :, :].clone()
        return super().attend(call)

    def score(self, call: Call | None) -> torch.Tensor:
        """How much the judges look at each row; nothing for their own, which are safe by rule."""
        if call is None:
            raise RunError("rows are judged by queries: drop them after attention, not before.")
        judges = call.query[..., -self.window :, :] if self.queries is None else self.queries
        scores = judge(
            judges,
            self.keys,
            call.scale,
            kernel=self.kernel,
            pooling=self.pooling,
            heads=self.heads,
        )
        return functional.pad(scores, (0, judges.shape[TOKENS]))

    def keep(self, kept: torch.Tensor) -> None:
        """Keep these rows, and every judge: contiguous positions leave the newest where they are."""
        judges, self.queries = self.queries, None
        super().keep(kept)
        self.queries = judges


class Judged(Evict):
    """Parameters of methods that let the newest queries judge."""

    window: int = Field(64, ge=1)
    """Newest tokens that judge, and are always kept. A prompt that is no longer stays whole."""
    kernel: int = Field(5, ge=1)
    """Neighbouring tokens whose scores are pooled, an odd number; 1: none."""
    pooling: Pooling = "avg"
    """avg or max of the pooled scores."""
    heads: Reduction = "mean"
    """How the query heads that share a key/value head agree on its rows: mean, max or sum."""

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that it has a middle, not {self.kernel}")
        return self

    def rule(self, rotary: Rotary | None = None) -> Rule:
        """The window is safe."""
        return super().rule(rotary)._replace(recent=self.window)
