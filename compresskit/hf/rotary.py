"""Rotary positions of keys: turn them to other places, or take the rotation off.

A key at position p was multiplied, pair by pair of its first `2 n` numbers, by e^(i p f_j): moving it
by d places multiplies by e^(i d f_j) more, whatever p was. Frequencies come from the model's own
rotary module, so scaled ones (linear, Llama 3, YaRN) are right; a factor on the whole (YaRN's
attention factor) is on the key already and stays.

Models differ in which numbers make a pair, and some leave the rotation out in some layers. Nothing
here knows their names: `Rotary.of` moves keys of the model at hand and looks whether they become the
ones that the model itself computes at the other place.

Paper: Su et al. 2021, RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from compresskit.errors import Conflict
from compresskit.hf.cache import new_dynamic

if TYPE_CHECKING:
    from typing import Self

CHANGING = ("dynamic", "longrope")
"""Kinds whose frequencies depend on the length of the text: a key cannot be moved by a difference."""
PROBES = 4
"""Tokens that `Rotary.of` looks at, each as a text of its own."""
STEP = 16
"""Places that it moves them: far enough for the fast pairs to turn, and inside every context."""
TOLERANCE = 0.05
"""Relative error that bfloat16 stays far below; a wrong pairing is wrong by about 1."""


class Rotary(NamedTuple):
    """Frequencies of a model's full-attention layers."""

    frequencies: torch.Tensor
    """float32 `[n]`, radians a position; the pairs are (j, j + n)."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """Find them, and check them by two forward passes of a few single tokens.

        Raises:
            Conflict: the model has no rotary positions, or some that cannot be moved.
        """
        kind = model.config.model_type
        for module in model.modules():
            for prefix in ("", "full_attention_"):
                found = getattr(module, f"{prefix}inv_freq", None)
                if isinstance(found, torch.Tensor) and found.dim() == 1:
                    _refuse_changing(module, prefix, kind)
                    rotary = cls(found.detach().float().clone())
                    rotary.check(model)
                    return rotary
        raise Conflict(
            f"{kind} has no rotary positions: keys cannot be moved. Use positions=original."
        )

    def move(self, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Turn `keys` `[B, K, S, D]` by `places` `[B, K, S]` positions (negative: back).

        `places` may leave out leading dimensions. Computed in float32, returned in the type of
        `keys`, which rounds once per call.
        """
        angles = places.unsqueeze(-1) * self.frequencies.to(keys.device)
        cos, sin = angles.cos(), angles.sin()
        n = self.frequencies.shape[0]
        x = keys.float()
        first, second = x[..., :n], x[..., n : 2 * n]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((turned.to(keys.dtype), keys[..., 2 * n :]), dim=-1)

    def check(self, model: Any) -> None:
        """Raise `Conflict` unless `move` does to keys of `model` what its own rotation does.

        A token that is alone attends to itself, wherever it stands, so that in every layer its key
        differs between two places by the rotation and nothing else.
        """
        n = 2 * self.frequencies.shape[0]
        for index, (here, there) in enumerate(
            zip(_keys_at(model, 0), _keys_at(model, STEP), strict=True)
        ):
            if here is None or there is None:
                continue
            moved = self.move(here, torch.tensor([STEP], device=here.device))
            error = (moved.float() - there.float())[..., :n].norm()
            if not error <= TOLERANCE * there.float()[..., :n].norm():
                raise Conflict(
                    f"{model.config.model_type} pairs the numbers of a key in another way than by "
                    f"halves, or leaves the rotation out (seen in layer {index}): keys cannot be "
                    "moved. Use positions=original."
                )


@torch.inference_mode()
def _keys_at(model: Any, place: int) -> list[torch.Tensor | None]:
    """Keys `[B, K, 1, D]` of single tokens at `place`, by layer; None where attention is not full."""
    tokens = torch.arange(1, 1 + PROBES, device=model.device).unsqueeze(-1)
    cache = new_dynamic(model.config)
    model(
        input_ids=tokens,
        position_ids=torch.full_like(tokens, place),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return [layer.keys if type(layer) is DynamicLayer else None for layer in cache.layers]


def _refuse_changing(module: torch.nn.Module, prefix: str, kind: str) -> None:
    """Raise unless frequencies are the same at every length of text."""
    types = getattr(module, "rope_type", "default")
    rope = types.get(prefix.removesuffix("_"), "default") if isinstance(types, dict) else types
    if rope in CHANGING:
        raise Conflict(
            f"{kind} has {rope!r} rotary positions, whose frequencies change with the length of the "
            "text: keys cannot be moved by a difference. Use positions=original."
        )
