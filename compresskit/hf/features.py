"""Hidden states under the logits: what drafting heads read, at decoding and for training.

Both are what the model's own head is applied to (after the last norm), so one trained head serves
every step of a system.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from compresskit.errors import Conflict
from compresskit.hf import modules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


@torch.no_grad()
def states(model: Any, batches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states `[B, L, E]` of each batch of tokens `[B, L]`, without the head's work."""
    base = model.base_model
    return [base(input_ids=tokens, use_cache=False).last_hidden_state for tokens in batches]


def frozen_head(model: Any) -> nn.Module:
    """The model's own head, which turns hidden states into logits and passes gradients through.

    Raises:
        Conflict: there is none, or it is packed.
    """
    top = modules.head(model)
    if top is None or isinstance(top, modules.HoldsBytes):
        raise Conflict(
            "heads are trained through the model's own head, which is "
            f"{'packed' if top is not None else 'missing'} here and passes no gradient. Leave the "
            "head out of the quantisation, or name the path of trained heads."
        )
    return top


def fingerprint(model: Any) -> str:
    """SHA-256 of the input embedding, as float32: the same for every precision that keeps it whole.

    Raises:
        Conflict: the embedding is packed.
    """
    weight = modules.embedding(model).weight().float().cpu().contiguous()
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()
