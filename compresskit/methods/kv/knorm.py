"""Keep the keys with the smallest norm: they are the ones that attention goes to.

score[s] = -|k_s|
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import JsonValue

from compresskit.methods.kv._evict import Evict, EvictingLayer, Rule

if TYPE_CHECKING:
    from compresskit.hf.attention import Call


class KnormLayer(EvictingLayer):
    """Looks at keys alone, so rows are dropped before anybody attends to them again."""

    def score(self, call: Call | None) -> torch.Tensor:
        """Minus the norm of each key."""
        norms: torch.Tensor = torch.linalg.vector_norm(self.keys.float(), dim=-1)
        return -norms


@final
class Knorm(Evict):
    """Drop the prompt keys with the largest norm.

    Paper: Devoto et al. 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression,
    arXiv 2406.11430.
    Differs: applied to every layer; the paper leaves the first two alone. Models that normalise the
    keys of each head (Qwen3, Gemma 3) leave their lengths little to tell.
    Cost: one norm per key, once; no attention is looked at.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"ratio": 0.5}

    def layer(self, rule: Rule, index: int, layers: int) -> EvictingLayer:
        """The same for every layer of the model."""
        return KnormLayer(rule)
