"""Keep the keys that are least like the others: they are what attention can tell apart.

anchor = mean over s of k_s / |k_s|      score[s] = -cos(k_s, anchor)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import JsonValue
from torch.nn.functional import normalize

from compresskit.hf.cache import TOKENS
from compresskit.methods.kv._evict import Evict, EvictingLayer, Rule

if TYPE_CHECKING:
    import torch

    from compresskit.hf.attention import Call


class KeyDiffLayer(EvictingLayer):
    """Looks at keys alone, so rows are dropped before anybody attends to them again."""

    def score(self, call: Call | None) -> torch.Tensor:
        """Minus the cosine between each key and the mean direction of all keys of its head."""
        directions = normalize(self.keys.float(), dim=-1)
        anchor = normalize(directions.mean(TOKENS, keepdim=True), dim=-1)
        return -(directions * anchor).sum(-1)


@final
class KeyDiff(Evict):
    """Drop the prompt keys that point where most of the others point.

    Paper: Park et al. 2025, KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
    Inference in Resource-Constrained Environments, arXiv 2504.15364 (with the mean of normalised
    keys as anchor).
    Differs: the prompt is compressed once, after it was read as a whole; the paper reads it block by
    block and keeps to its budget after each. `decoding=hold` does so for the tokens after the prompt.
    Cost: one normalised copy of the keys of a layer, once; no attention is looked at.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"ratio": 0.5}

    def layer(self, rule: Rule, index: int, layers: int) -> EvictingLayer:
        """The same for every layer of the model."""
        return KeyDiffLayer(rule)
