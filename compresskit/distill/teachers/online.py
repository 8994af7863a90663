"""The teacher itself: it reads every batch.

Only the base model runs here. The hidden states under the logits are `E` numbers a place where the
logits are `V`; the loss makes logits from them a chunk at a time and never holds them all.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from compresskit.distill.batch import Dense
from compresskit.hf import head as heads
from compresskit.hf.states import behind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from compresskit.distill.batch import Batch


@final
class Online:
    """A frozen transformers model, asked afresh for every batch."""

    kind: Literal["dense"] = "dense"

    def __init__(
        self, model: Any, *, states: Sequence[int] = (), autocast: torch.dtype | None = None
    ) -> None:
        """Freeze `model`.

        states: blocks behind which a hidden-state loss wants to look. autocast: the type that matrix
        products are computed in, None for the model's own.

        Raises:
            Conflict: it cannot be split into base and head, or has no such blocks.
        """
        self.model = model.eval().requires_grad_(False)
        self.base, self.head = heads.split(model)
        self.states = tuple(states)
        self.autocast = autocast
        self.tokens_read = 0
        with behind(model, self.states):
            pass

    @property
    def vocabulary(self) -> int:
        """Logits a place."""
        return int(self.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Dense:
        """Read all tokens of each row but the last, after which no token is known."""
        tokens = batch.tokens[:, :-1]
        self.model.eval()  # whoever holds the model may have trained it since
        with self._casting(tokens.device), behind(self.model, self.states) as seen:
            output = self.base(input_ids=tokens, use_cache=False)
        self.tokens_read += tokens.numel()
        flat = {index: state.flatten(0, 1) for index, state in seen.items()}
        return Dense(output.last_hidden_state.flatten(0, 1), self.head, flat)

    @torch.no_grad()
    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 log-probabilities `[n, V]` over hidden states `[n, E]`."""
        with self._casting(hidden.device):
            logits: torch.Tensor = self.head(hidden)
        return logits.float().log_softmax(-1)

    def _casting(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)
