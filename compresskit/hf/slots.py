"""Slots of a cache after a pass in which only some tokens stay.

    one row     a b c [d x e y]      keep 0, 2 of 4: the rows of d and e move up, the rest is cropped
    a batch     a b c [d x e y]      slots cannot move row by row and stay a rectangle: the loop masks
                p q r [s t u v]      x and y, and `rearrange` gathers once too many are masked

Both need layers that hold one row a token, in order, and attention that goes by mask and position
alone (`Trait.SLOT_MASKS`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import StaticLayer

from compresskit.errors import RunError
from compresskit.hf.cache import TOKENS, roll_back

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers.cache_utils import Cache


def capacity(cache: Cache) -> int | None:
    """Slots of a cache whose shapes never change, or None if it grows."""
    lengths = {int(layer.max_cache_len) for layer in cache.layers if isinstance(layer, StaticLayer)}
    return max(lengths) if lengths else None


def keep(cache: Cache, new: int, kept: Sequence[int]) -> None:
    """Of the newest `new` slots keep those at `kept` (rising), in every row, and crop the rest."""
    if list(kept) != list(range(len(kept))):
        for layer, name, held in _tensors(cache):
            last = _used(layer, held)
            source = torch.tensor([last - new + place for place in kept], device=held.device)
            moved = held.index_select(held.dim() + TOKENS, source)
            held[..., last - new : last - new + len(kept), :] = moved
            setattr(layer, name, held)
    roll_back(cache, new - len(kept))


def rearrange(cache: Cache, slots: torch.Tensor) -> None:
    """Make slot i of row b what slot `slots[b, i]` was; n slots of `slots` `[B, n]` remain."""
    rows, count = slots.shape
    for layer, name, held in _tensors(cache):
        index = slots.to(held.device).view(rows, 1, count, 1)
        moved = held.gather(2, index.expand(rows, held.shape[1], count, held.shape[3]))
        if isinstance(layer, StaticLayer):
            held[:, :, :count] = moved
        else:
            setattr(layer, name, moved)
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(count)


def _used(layer: Any, held: torch.Tensor) -> int:
    """Slots of a tensor that tokens have."""
    return (
        int(layer.cumulative_length)
        if isinstance(layer, StaticLayer)
        else held.shape[held.dim() + TOKENS]
    )


def _tensors(cache: Cache) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """Every tensor of every layer that holds a row a token."""
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "sliding_window", None) is not None:
            raise RunError(
                f"cache layer {index} ({type(layer).__name__}) goes by slots, not by positions: "
                "single slots of it cannot be dropped."
            )
        for name in getattr(layer, "tensors", ("keys", "values")):
            held = getattr(layer, name, None)
            if held is not None:
                yield layer, name, held
