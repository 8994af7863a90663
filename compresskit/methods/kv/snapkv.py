"""Keep the prompt keys that the newest queries look at.

score[s] = mean over the last W queries of softmax(q k_s), pooled over neighbours and query heads
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

from compresskit.methods.kv._judged import Judged, JudgedLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue

    from compresskit.methods.kv._evict import EvictingLayer, Rule


@final
class SnapKV(Judged):
    """Keep the newest `window` tokens and the older ones that their queries look at most.

    Paper: Li et al. 2024, SnapKV: LLM Knows What You are Looking for Before Generation,
    arXiv 2404.14469.
    Differs: query heads that share keys choose together (`heads`); the budget counts the window.
    `decoding=hold` goes on dropping, with the newest queries as judges; the paper drops once.
    A question at the end of the prompt is among the judges, so figures of prompts that end with
    their question flatter it.
    Cost: one extra product `[B, H, window, S]` per layer when rows are dropped, at the prompt only
    unless `decoding=hold`, which also holds `window` queries per query head.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"ratio": 0.5, "window": 16}

    def layer(self, rule: Rule, index: int, layers: int) -> EvictingLayer:
        """The same for every layer of the model."""
        return JudgedLayer(
            rule, window=self.window, kernel=self.kernel, pooling=self.pooling, heads=self.heads
        )

    def describe(self) -> str:
        """One phrase about what is kept."""
        return f"{super().describe()}, by the newest {self.window} queries"
