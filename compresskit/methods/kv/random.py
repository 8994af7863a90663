"""Keep rows by lot: what an eviction rule must beat at equal bytes.

score[s] = a draw from [0, 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import torch
from pydantic import JsonValue

from compresskit.methods.kv._evict import Evict, EvictingLayer, Rule

if TYPE_CHECKING:
    from compresskit.hf.attention import Call
    from compresskit.method import Context
    from compresskit.system import System


class RandomLayer(EvictingLayer):
    """Draws for each head by itself, and for every row of a batch the same: it equals the row alone."""

    def __init__(self, rule: Rule, index: int) -> None:
        """Layer number `index` draws by itself too."""
        super().__init__(rule)
        self.index = index

    def score(self, call: Call | None) -> torch.Tensor:
        """Independent draws, the same whenever seed, layer and the number of tokens seen are."""
        batch, heads, rows = self.keys.shape[:3]
        rng = np.random.default_rng((self.rule.seed, self.index, self.cumulative_length))
        draws = torch.from_numpy(rng.random((heads, rows), dtype=np.float32))
        return draws.to(self.keys.device).expand(batch, heads, rows)


@final
class RandomEviction(Evict):
    """Drop rows by lot: a control, never a recommendation.

    A rule that does not beat it at equal bytes has learnt nothing about what can be forgotten.

    Paper: none; the control of every eviction study, for example of the library kvpress (RandomPress).
    Differs: every drop is a new draw among the rows still held, so that with `decoding=hold` old
    tokens thin out instead of being a uniform sample of the whole text.
    Cost: one draw per head and row at each drop, made on the CPU.
    """

    chosen: ClassVar[str] = "by lot"
    example: ClassVar[Mapping[str, JsonValue]] = {"ratio": 0.5}

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer a bounded cache; draws depend on the seed of the run."""
        return self.bounded(system, seed=ctx.seed)

    def layer(self, rule: Rule, index: int, layers: int) -> EvictingLayer:
        """Layers differ in their draws."""
        return RandomLayer(rule, index)
