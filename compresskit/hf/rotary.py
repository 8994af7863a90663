"""Rotary positions of keys: turn them to other places, or take the rotation off.

A key at position p was multiplied, pair by pair of its first `2 n` numbers, by e^(i p f_j): moving it
by d places multiplies by e^(i d f_j) more, whatever p was. Frequencies come from the model's own
rotary module, so scaled ones (linear, Llama 3, YaRN) are right; a factor on the whole (YaRN's
attention factor) is on the key already and stays.

Paper: Su et al. 2021, RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.errors import Conflict

if TYPE_CHECKING:
    from typing import Self

CHANGING = ("dynamic", "longrope")
"""Kinds whose frequencies depend on the length of the text: a key cannot be moved by a difference."""


class Rotary(NamedTuple):
    """Frequencies of a model's full-attention layers."""

    frequencies: torch.Tensor
    """float32 `[n]`, radians a position; the pairs are (j, j + n)."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """Find them.

        Raises:
            Conflict: the model has no rotary positions, or some that cannot be moved.
        """
        kind = model.config.model_type
        for module in model.modules():
            for prefix in ("", "full_attention_"):
                found = getattr(module, f"{prefix}inv_freq", None)
                if isinstance(found, torch.Tensor) and found.dim() == 1:
                    _check(module, prefix, kind)
                    return cls(found.detach().float().clone())
        raise Conflict(
            f"{kind} has no rotary positions: keys cannot be moved. Use positions=original."
        )

    def move(self, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Turn `keys` `[B, K, S, D]` by `places` `[B, K, S]` positions (negative: back)."""
        angles = places.unsqueeze(-1) * self.frequencies.to(keys.device)
        cos, sin = angles.cos(), angles.sin()
        n = self.frequencies.shape[0]
        x = keys.float()
        first, second = x[..., :n], x[..., n : 2 * n]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((turned.to(keys.dtype), keys[..., 2 * n :]), dim=-1)


def _check(module: torch.nn.Module, prefix: str, kind: str) -> None:
    """Raise unless frequencies are the same at every length, and pairs are half a rotation apart."""
    types = getattr(module, "rope_type", "default")
    rope = types.get(prefix.removesuffix("_"), "default") if isinstance(types, dict) else types
    if rope in CHANGING:
        raise Conflict(
            f"{kind} has {rope!r} rotary positions, whose frequencies change with the length of the "
            "text: keys cannot be moved by a difference. Use positions=original."
        )
    rotate_half = getattr(inspect.getmodule(type(module)), "rotate_half", None)
    probe = torch.arange(4.0)
    if rotate_half is None or rotate_half(probe).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        raise Conflict(
            f"{kind} pairs neighbouring numbers in its rotary positions, or in a way unknown here: "
            "keys cannot be moved. Use positions=original."
        )
