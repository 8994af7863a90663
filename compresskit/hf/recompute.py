"""Decoding without a key/value cache: every pass runs the whole text again.

    cache   the token ids so far (and their positions), 8 bytes each
    step    append the new ids, run all of them, return the logits of the new ones

The cost of a step then grows with the text, which is what a cache saves.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache

from compresskit.hf.cache import Layer

if TYPE_CHECKING:
    import torch

    from compresskit.system import Step


class TextLayer(Layer):
    """Holds ids `[B, 1, S, 1]` instead of keys and values; cropping forgets ids."""

    tensors = ("ids", "positions")
    holds = MappingProxyType({"ids": "ids", "positions": "ids"})

    ids: torch.Tensor | None
    positions: torch.Tensor | None

    def extend(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> None:
        """Append `tokens` `[B, T]`, and their `positions` where they are not contiguous."""
        self.lazy_initialization(tokens, tokens)
        self.append(ids=tokens[:, None, :, None])
        if positions is not None:
            self.append(positions=positions.expand_as(tokens)[:, None, :, None])

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return 0 if self.ids is None else self.ids.shape[-2]


def new_text(capacity: int) -> Cache:
    """Return an empty text; it grows without bound."""
    return Cache(layers=[TextLayer()])


def recompute_step(model: Any) -> Step:
    """Return a step for such caches."""

    def step(
        tokens: torch.Tensor,
        cache: Any,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: int = 1,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        text: TextLayer = cache.layers[0]
        text.extend(tokens, positions)
        assert text.ids is not None  # appended to just now
        keep = keep or tokens.shape[1]
        output = model(
            input_ids=text.ids[:, 0, :, 0],
            attention_mask=mask,
            position_ids=None if text.positions is None else text.positions[:, 0, :, 0],
            use_cache=False,
            logits_to_keep=keep,
            output_hidden_states=features is not None,
        )
        logits: torch.Tensor = output.logits
        if features is not None:
            features.append(output.hidden_states[-1][:, -keep:])
        return logits

    return step
