"""One eager forward pass through a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from compresskit.system import Step


def eager_step(model: Any) -> Step:
    """Return a step that calls `model` as it is.

    `logits_to_keep` spares the head's work for positions whose logits nobody reads: at prefill
    that is all but the last.
    """

    def step(
        tokens: torch.Tensor,
        cache: Any,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: int = 1,
    ) -> torch.Tensor:
        output = model(
            input_ids=tokens,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits
        return logits

    return step
