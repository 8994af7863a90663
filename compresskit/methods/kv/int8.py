"""Keys and values as 8-bit integers with one scale per token and head.

x [B, K, T, D] ──► scale = max|x| / 127 per row ──► codes = round(x / scale)
                                                        │ stored
attention reads   codes * scale   of all tokens, old and new
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch

from compresskit.hf.cache import Layer, factory
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from compresskit.system import System

LEVELS = 127
"""Codes run from -127 to 127: symmetric, so that zero is exact."""


class Rows(NamedTuple):
    """Quantised rows: int8 codes `[B, K, T, D]` and their float32 scales `[B, K, T, 1]`."""

    codes: torch.Tensor
    scales: torch.Tensor


def quantise(x: torch.Tensor) -> Rows:
    """Round each row of `x` `[B, K, T, D]` to 255 levels; the error is at most half a scale."""
    x = x.float()
    # The smallest normal number stands in for the scale of an all-zero row, whose codes are 0.
    scales = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return Rows((x / scales).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scales)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `codes * scales` in `dtype`, multiplied in float32."""
    return codes.float().mul_(scales).to(dtype)


class Int8Layer(Layer):
    """Append-only: a token is quantised once, when it arrives, and never again."""

    tensors = ("keys", "values", "key_scales", "value_scales")
    holds = MappingProxyType(
        {"keys": "codes", "values": "codes", "key_scales": "scales", "value_scales": "scales"}
    )

    key_scales: torch.Tensor
    value_scales: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the codes of the new rows; return all rows as they are stored."""
        self.lazy_initialization(key_states, value_states)
        keys, values = quantise(key_states), quantise(value_states)
        self.append(
            keys=keys.codes, key_scales=keys.scales, values=values.codes, value_scales=values.scales
        )
        return (
            dequantise(self.keys, self.key_scales, key_states.dtype),
            dequantise(self.values, self.value_scales, value_states.dtype),
        )


@final
class Int8Cache(AbstractMethod):
    """Store keys and values as int8 codes with one float32 scale per token and head.

    Paper: Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339 (symmetric absmax
    quantisation by row), applied to cache rows; the "per-token" layout of Liu et al. 2024, KIVI,
    arXiv 2402.02750, for both keys and values.
    Differs: no outlier decomposition and no full-precision tail. Attention reads the stored codes
    from the first forward pass on, the new tokens' own included, so the result does not depend on
    how the tokens are cut into passes: a window scored in one pass shows the same error as
    decoding, and tokens taken back leave no trace. Sliding-window layers stay as they are.
    Cost: `head_dim + 4` bytes per row instead of `2 * head_dim` (bfloat16) or `4 * head_dim`
    (float32); every step writes a full-precision copy of one layer's cache, so decoding is slower,
    not faster, unless a fused kernel reads the codes. Appending concatenates the codes: measured on
    one CPU core at 4096 tokens, that is a quarter of the dequantisation, and it leaves no slack.
    """

    stage: ClassVar[Stage] = Stage.CACHE

    def effects(self) -> Effects:
        """Floats are gone, but every token is there and the last ones can be taken back."""
        return Effects(
            requires=frozenset({Trait.OWN_CACHE, Trait.DENSE_CACHE}),
            removes=frozenset({Trait.DENSE_CACHE, Trait.STATIC_SHAPES, Trait.LOSSLESS}),
        )

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer an int8 cache."""
        return replace(
            system,
            new_cache=factory(system.model.config, lambda index: Int8Layer()),
            facts=MappingProxyType(
                {**system.facts, "cache": "int8 codes, one float32 scale per token and head"}
            ),
        )
