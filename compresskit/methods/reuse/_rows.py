"""The memory of a store: rows of all layers, by slot.

One tensor for each tensor of each layer, `[heads, slots * unit, row bytes]`: reading any slots is one
gather that writes just what a cache layer holds, whatever its type (floats, codes, scales).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.hf.rows import Layout


class RowMemory:
    """Rows of `slots * unit` tokens, taken from memory at once."""

    def __init__(
        self,
        layout: Layout,
        *,
        slots: int,
        unit: int,
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        """Hold nothing of use yet; `pinned` is host memory that a GPU copies from directly."""
        self.layout, self.unit, self.device = layout, unit, device
        self._slabs = [
            torch.empty(
                slab.heads,
                slots * unit,
                slab.row_bytes,
                dtype=torch.uint8,
                device=device,
                pin_memory=pinned,
            )
            for slab in layout.slabs
        ]

    def write(self, slots: Sequence[int], cache: Any, start: int) -> None:
        """Copy the rows of `cache` (one sequence) from token `start` on into `slots`."""
        places = self._places(slots)
        for slab, memory in zip(self.layout.slabs, self._slabs, strict=True):
            held: torch.Tensor = getattr(cache.layers[slab.layer], slab.name)
            rows = held.detach()[0, :, start : start + len(places)].contiguous()
            memory.index_copy_(1, places, rows.view(torch.uint8))

    def read(self, slots: Sequence[int], count: int) -> list[torch.Tensor]:
        """The first `count` rows of `slots`: new tensors `[1, heads, count, width]` for each slab."""
        places = self._places(slots)[:count]
        return [
            memory.index_select(1, places).view(slab.dtype).unsqueeze(0)
            for slab, memory in zip(self.layout.slabs, self._slabs, strict=True)
        ]

    def copy(self, slot: int, target: RowMemory, place: int) -> None:
        """Copy one slot to `place` of another memory of the same layout."""
        here = slice(slot * self.unit, (slot + 1) * self.unit)
        there = slice(place * self.unit, (place + 1) * self.unit)
        for source, goal in zip(self._slabs, target._slabs, strict=True):
            goal[:, there].copy_(source[:, here])

    def _places(self, slots: Sequence[int]) -> torch.Tensor:
        first = torch.tensor(slots, dtype=torch.long, device=self.device).unsqueeze(1) * self.unit
        return (first + torch.arange(self.unit, device=self.device)).flatten()


class Tiers:
    """Moves blocks between the device's memory and the host's."""

    def __init__(self, device: RowMemory, host: RowMemory) -> None:
        """Both hold blocks of the same size."""
        self.device, self.host = device, host

    def spill(self, block: int, place: int) -> None:
        """Copy device `block` to host `place`."""
        self.device.copy(block, self.host, place)

    def fetch(self, place: int, block: int) -> None:
        """Copy host `place` to device `block`."""
        self.host.copy(place, self.device, block)
