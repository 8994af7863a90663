"""A second tier behind a block store: what leaves the device waits in host memory.

    device   [a][b][c]   c is needed no more, d needs room
                 └── spill ──►  host   [x][c]     the oldest one there goes for good
    device   [a][b][d]
                 ◄── fetch ──   a prompt that begins a b c brings c back

A place that is on its way back is taken, and gets nothing new until it is given.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Mover(Protocol):
    """Copies a block between device and host memory."""

    def spill(self, block: int, place: int) -> None:
        """Copy device `block` to host `place`."""

    def fetch(self, place: int, block: int) -> None:
        """Copy host `place` to device `block`."""


class HostTier:
    """Places in host memory for blocks that left the device; the least recently used one goes."""

    def __init__(self, places: int, mover: Mover) -> None:
        """Be empty."""
        self.mover = mover
        self._place_of: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(reversed(range(places)))

    def __contains__(self, key: bytes) -> bool:
        """Tell whether the block with this key is here."""
        return key in self._place_of

    def put(self, key: bytes, block: int) -> bool:
        """Copy `block` here; False if every place is on its way back to the device."""
        if key in self._place_of:
            place = self._place_of.pop(key)
        elif self._free:
            place = self._free.pop()
        elif self._place_of:
            _, place = self._place_of.popitem(last=False)
        else:
            return False
        self.mover.spill(block, place)
        self._place_of[key] = place
        return True

    def take(self, key: bytes) -> int:
        """Reserve the place of `key` for `give`."""
        return self._place_of.pop(key)

    def give(self, place: int, block: int) -> None:
        """Copy what was taken to `block`."""
        self.mover.fetch(place, block)
        self._free.append(place)

    def put_back(self, key: bytes, place: int) -> None:
        """Undo `take`."""
        self._place_of[key] = place
