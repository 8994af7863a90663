"""Drop the keys that the newest query looks at least.

score[s] = mean over all query heads of softmax(q_last k_s)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import JsonValue

from compresskit.errors import RunError
from compresskit.methods.kv._evict import Evict, EvictingLayer, Rule
from compresskit.methods.kv._scores import probabilities

if TYPE_CHECKING:
    import torch

    from compresskit.hf.attention import Call


class TovaLayer(EvictingLayer):
    """All heads keep the same tokens."""

    watches = True

    def score(self, call: Call | None) -> torch.Tensor:
        """What the newest query gives to each row, its own included."""
        if call is None:
            raise RunError("rows are judged by a query: drop them after attention, not before.")
        attention = probabilities(call.query[:, :, -1:], self.keys, call.scale)
        # [B, H, 1, S] to [B, 1, S], and the same for every head.
        return attention.mean(dim=1).expand(-1, self.keys.shape[1], -1)


@final
class Tova(Evict):
    """Drop what the newest query attends to least, as if the cache were the state of an RNN.

    Paper: Oren et al. 2024, Transformers are Multi-State RNNs, arXiv 2401.06104 (token omission via
    attention).
    Differs: rows are dropped every `interval` tokens, by the query of that moment; the paper drops
    one in every step, which is `interval=1`. The prompt is read in one pass and cut after it.
    Cost: one extra product `[B, H, 1, S]` per layer when rows are dropped.
    """

    chosen: ClassVar[str] = "by the newest query's attention"
    example: ClassVar[Mapping[str, JsonValue]] = {"ratio": 0.5}

    decoding: Literal["grow", "hold"] = "hold"
    """hold: the cache goes back to its budget. grow: tokens decoded after the prompt all stay."""

    def layer(self, rule: Rule, index: int, layers: int) -> EvictingLayer:
        """The same for every layer of the model."""
        return TovaLayer(rule)
