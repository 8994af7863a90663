"""Keep the keys that attracted most attention so far, and the newest ones.

score[s] = sum over all queries since s of softmax(q k_s)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit.errors import RunError
from compresskit.hf.cache import KEYS_VALUES
from compresskit.methods.kv._evict import Evict, EvictingLayer, Rule
from compresskit.methods.kv._scores import column_sums, reduce_heads

if TYPE_CHECKING:
    from compresskit.hf.attention import Call


class H2OLayer(EvictingLayer):
    """Adds up the attention that each row got; the sums go with their rows."""

    tensors = ("keys", "values", "mass")
    holds = MappingProxyType({**KEYS_VALUES, "mass": "index"})
    watches = True

    mass: torch.Tensor | None
    """float32 `[B, K, S, 1]`."""

    def __init__(self, rule: Rule, *, recent: float) -> None:
        """Hold nothing yet; `recent` is the share of the budget for the newest rows."""
        super().__init__(rule)
        self.recent = recent

    def attend(self, call: Call) -> torch.Tensor:
        """Attend, add up what each row got, then drop."""
        if self.limit is None or self.rule.hold:
            self.add(call)
        answer = super().attend(call)
        if not self.rule.hold:
            # Nothing is dropped any more, so nobody will ask.
            self.mass = None
        return answer

    def add(self, call: Call) -> None:
        """Add the attention of the call's queries."""
        sums = column_sums(call.query, call.keys, call.scale)
        mass = reduce_heads(sums, call.keys.shape[1], "mean").unsqueeze(-1)
        if self.mass is not None:
            mass[..., : self.mass.shape[-2], :] += self.mass
        self.mass = mass

    def score(self, call: Call | None) -> torch.Tensor:
        """The sums; the newest part of the budget is safe."""
        if self.mass is None or self.limit is None:
            raise RunError("no attention has been added up yet: drop rows after attention.")
        scores = self.mass.squeeze(-1).clone()
        safe = int(self.limit * self.recent)
        scores[..., scores.shape[-1] - safe :] = torch.inf
        return scores


@final
class H2O(Evict):
    """Keep the heavy hitters: tokens that all queries so far attended to most, and the newest ones.

    Paper: Zhang et al. 2023, H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models, arXiv 2306.14048.
    Differs: query heads that share keys are averaged. The prompt is read in one pass and cut after
    it, not token by token; with `decoding=hold` rows are dropped every `interval` tokens. Old tokens
    were seen by more queries than new ones, which favours the start of the prompt; the paper's sums
    do the same.
    Cost: the prompt's attention a second time, in blocks of bounded memory. `decoding=hold` goes on
    with one product `[B, H, 1, S]` per step and layer, and holds a number per row and head.
    """

    chosen: ClassVar[str] = "by the attention they got so far, and newest,"
    example: ClassVar[Mapping[str, JsonValue]] = {"ratio": 0.5}

    recent: float = Field(0.5, ge=0, lt=1)
    """Share of the budget that goes to the newest rows; the rest goes to the heavy hitters."""

    def layer(self, rule: Rule, index: int, layers: int) -> EvictingLayer:
        """The same for every layer of the model."""
        return H2OLayer(rule, recent=self.recent)
