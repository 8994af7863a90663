"""One eager forward pass through a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compresskit.system import Step


def eager_step(model: Any) -> Step:
    """Return a step that calls `model` as it is.

    `logits_to_keep` spares the head's work for positions whose logits nobody reads: at prefill
    that is all but the last. The positions go in as indices: a slice would hand the head a strided
    view, for which torch multiplies in a batch and first copies the whole transposed weight (50 ms
    for the 49,152 x 576 head of SmolLM2).
    """

    def step(
        tokens: torch.Tensor,
        cache: Any,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: int = 1,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        new = tokens.shape[1]
        sliced = 0 < keep < new
        output = model(
            input_ids=tokens,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=torch.arange(new - keep, new, device=tokens.device) if sliced else keep,
            output_hidden_states=features is not None,
        )
        logits: torch.Tensor = output.logits
        if features is not None:
            features.append(output.hidden_states[-1][:, -keep if keep else 0 :])
        return logits

    return step
