"""A cache of bounded size: the first tokens and the newest ones.

tokens seen   0 1 2 3 | 4 5 6 ... 90 | 91 92 ... 122
               sink       dropped          window
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit.hf.cache import TOKENS
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._evict import EFFECTS, EvictingLayer, Positions, Rule, rotary_for
from compresskit.methods.kv._layers import install

if TYPE_CHECKING:
    from compresskit.hf.attention import Call
    from compresskit.system import System
    from compresskit.traits import Effects


def keep(rows: torch.Tensor, *, sink: int, window: int) -> torch.Tensor:
    """Return the first `sink` and the last `window` rows of `[B, K, S, *]`."""
    return torch.cat((rows[..., :sink, :], rows[..., -window:, :]), dim=TOKENS)


class SinkWindowLayer(EvictingLayer):
    """Forgets the middle after each forward pass; no score is needed to know which rows it is."""

    tensors = ("keys", "values", "first")
    holds = MappingProxyType(dict.fromkeys(tensors, "keys_values"))

    first: torch.Tensor
    """Keys of the sinks at their original positions, `[B, K, sink, D]`; None unless keys move."""

    def score(self, call: Call | None) -> torch.Tensor:
        """Newer is better; the sinks are safe by rule."""
        order = torch.arange(self.rows, dtype=torch.float32, device=self.keys.device)
        return order.expand(self.keys.shape[:TOKENS] + order.shape)

    def drop(self, limit: int, call: Call | None) -> None:
        """What `score` chooses, by slices."""
        sink, rotary = self.rule.sink, self.rule.rotary
        if rotary is not None and self.first is None:
            self.first = self.keys[..., :sink, :].clone()
        self.keys = keep(self.keys, sink=sink, window=limit - sink)
        self.values = keep(self.values, sink=sink, window=limit - sink)
        if rotary is not None:
            # From where they were: moved on by one place a step, they would gather rounding errors.
            gap = torch.tensor([self.cumulative_length - limit], device=self.keys.device)
            self.keys[..., :sink, :] = rotary.move(self.first, gap)


@final
class SinkWindow(AbstractMethod):
    """Keep the first `sink` tokens and the `window` newest ones; drop what lies between.

    Paper: Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks,
    arXiv 2309.17453.
    Differs: by default kept keys stay rotated by their original positions; `positions=contiguous` has
    the paper's distances between tokens. Generation ends at the model's context length. A forward
    pass of several tokens (the prompt) sees all of them and drops rows only afterwards.
    Sliding-window layers stay as they are.
    Cost: copies the kept rows of each layer once more per step, when something was dropped:
    under 1 % of a step of SmolLM2 135M at 1024 rows on one CPU core.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    example: ClassVar[Mapping[str, JsonValue]] = {"sink": 4, "window": 32}

    sink: int = Field(4, ge=0)
    """First tokens that are always kept."""
    window: int = Field(1020, ge=1)
    """Newest tokens that are kept."""
    positions: Positions = "original"
    """original: kept keys stay rotated by the positions they had. contiguous: the first ones close up
    to the newest, so that no distance is larger than the cache."""

    def effects(self) -> Effects:
        """As of all evicting methods."""
        return EFFECTS

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer a bounded cache."""
        rule = Rule(
            tokens=self.sink + self.window,
            hold=True,
            interval=1,
            sink=self.sink,
            rotary=rotary_for(system, self.positions),
        )
        return install(
            system,
            lambda index: SinkWindowLayer(rule),
            cache=f"first {self.sink} and newest {self.window} tokens",
            nominal={"keep_tokens": self.sink + self.window},
        )
