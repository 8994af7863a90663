"""Keys as they were before rotary positions: taken off when stored, put on again when read.

A channel of a bare key has a typical size and sign. The rotation mixes it with its partner, by
another angle at every position, so a range for each channel fits bare keys only.

Whether the rotation was understood is tried, not assumed: over a text that repeats one token every
position holds the same values, whatever attention does, so bare keys must be the same as well. A
model with absolute positions fails that in its values too, and is let pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.errors import Conflict
from compresskit.hf.rotary import Rotary

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

EQUAL = 0.05
"""Largest difference of keys or values that should be equal, by their largest number: bfloat16
rounding is an order below, a wrong rotation an order above."""


class Positions(NamedTuple):
    """How positions are on the keys of a model's full-attention layers."""

    rotary: Rotary | None
    """None: not at all, they are in the embeddings or nowhere."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """Find them.

        Raises:
            Conflict: they change with the length of the text, or pair numbers in an unknown way.
        """
        names = ("inv_freq", "full_attention_inv_freq")
        found = (getattr(module, name, None) for module in model.modules() for name in names)
        if not any(isinstance(one, torch.Tensor) for one in found):
            return cls(None)
        try:
            return cls(Rotary.of(model))
        except Conflict as error:
            raise _cannot(model) from error

    def off(self, keys: torch.Tensor, start: int) -> torch.Tensor:
        """Bare keys, float32, of `keys` `[B, K, T, D]` at positions from `start`."""
        return self._turned(keys, start, -1)

    def on(self, keys: torch.Tensor, start: int) -> torch.Tensor:
        """Keys, float32, of bare ones `[B, K, T, D]` that belong at positions from `start`."""
        return self._turned(keys, start, 1)

    def check(self, model: Any, layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Compare the keys and values `[1, K, T, D]` of each layer over one repeated token.

        Raises:
            Conflict: bare keys differ where values do not.
        """
        for keys, values in layers:
            if _varies(self.off(keys, 0)) and not _varies(values.float()):
                raise _cannot(model)

    def _turned(self, keys: torch.Tensor, start: int, sign: int) -> torch.Tensor:
        keys = keys.float()
        if self.rotary is None:
            return keys
        places = torch.arange(start, start + keys.shape[-2], device=keys.device)
        return self.rotary.move(keys, sign * places.view(1, 1, -1))


def _varies(rows: torch.Tensor) -> bool:
    """Whether rows `[1, K, T, D]` differ over T."""
    largest = rows.abs().amax()
    return bool((rows - rows[..., :1, :]).abs().amax() > EQUAL * largest)


def _cannot(model: Any) -> Conflict:
    return Conflict(
        f"kv/kvquant codes keys without their positions, and cannot take those of "
        f"{model.config.model_type} off: they change with the length of the text, or pair numbers "
        "in a way unknown here. Use kv/rotate or kv/kivi."
    )
