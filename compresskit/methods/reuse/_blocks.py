"""Prefixes as chains of hashed blocks, the way vLLM keeps them.

    tokens    a b c d | e f g h | i j
    keys      h1 = H(root, abcd)   h2 = H(h1, efgh)   not a full block: not stored

A key stands for all tokens up to the end of its block, so finding h2 means that h1 was the same
too. The root holds the identity of model and cache method, and the salt: who does not know the salt
finds nothing.

Blocks that nobody holds queue up to be used again, the least recently used one first; the blocks of
one request queue up from its end, because fewer prompts share a long prefix than a short one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from compresskit.methods.reuse._store import Match, Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.methods.reuse._host import HostTier
    from compresskit.methods.reuse._store import Write


def chain(tokens: Sequence[int], block: int, root: bytes) -> Iterator[bytes]:
    """Key of every full block of `tokens`: SHA-256 of the key before it and the block's ids."""
    ids = array("q", tokens).tobytes()
    size = 8 * block
    key = root
    for start in range(0, len(ids) - size + 1, size):
        key = hashlib.sha256(key + ids[start : start + size]).digest()
        yield key


def root(identity: str, salt: str) -> bytes:
    """Where a chain begins. The lengths in front keep one part from passing for another."""
    parts = [identity.encode(), salt.encode()]
    return hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p for p in parts)).digest()


class Allocated(NamedTuple):
    """A block for new rows, and the key of what was in it, if that could be found until now."""

    block: int
    evicted: bytes | None


class BlockPool:
    """Blocks by number: which ones are held, which key each has, and who is next to go."""

    def __init__(self, count: int) -> None:
        """All blocks are free, in the order of their numbers."""
        self.queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self.block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._holders = [0] * count

    def find(self, key: bytes) -> int | None:
        """The block with this key."""
        return self.block_of.get(key)

    def touch(self, block: int) -> None:
        """Hold a block, so that it is not given away."""
        self._holders[block] += 1
        self.queue.pop(block, None)

    def allocate(self) -> Allocated | None:
        """Take the block that was free for the longest time; None if all are held."""
        if not self.queue:
            return None
        block, _ = self.queue.popitem(last=False)
        self._holders[block] = 1
        key = self._key_of.pop(block, None)
        if key is not None:
            del self.block_of[key]
        return Allocated(block, key)

    def name(self, block: int, key: bytes) -> None:
        """Let the block be found by `key`, unless another one is already."""
        if key not in self.block_of:
            self.block_of[key], self._key_of[block] = block, key

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of the blocks of one request, given in the order of its text."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self.queue[block] = None


class BlockStore(Store):
    """Stores full blocks of prompts under chained hashes."""

    def __init__(self, slots: int, block: int, identity: str, host: HostTier | None = None) -> None:
        """Be empty; `host` takes what leaves the device."""
        super().__init__(slots, block, identity)
        self.pool, self.host = BlockPool(slots), host

    def lookup(self, tokens: Sequence[int], salt: str = "") -> Match:
        """Follow the chain of keys as far as blocks are stored, on the device or on the host."""
        keys = list(chain(tokens, self.unit, root(self.identity, salt)))
        # The whole chain is held before anything moves: making room must not break it.
        chained: list[_Device | _Host] = []
        for key in keys:
            block = self.pool.find(key)
            if block is not None:
                self.pool.touch(block)
                chained.append(_Device(block))
            elif self.host is not None and key in self.host:
                chained.append(_Host(key, self.host.take(key)))
            else:
                break
        blocks = self._bring(chained)
        return Match(tokens, blocks, len(blocks) * self.unit, keys=keys)

    def extend(self, match: Match, write: Write) -> None:
        """Store the full blocks after the match, from the front, as long as one is free."""
        new: list[int] = []
        for _ in match.keys[len(match.slots) :]:
            block = self._allocate()
            if block is None:
                break
            new.append(block)
        if not new:
            return
        try:
            write(new)
        except BaseException:
            self.pool.free(new)
            raise
        for block, key in zip(new, match.keys[len(match.slots) :], strict=False):
            self.pool.name(block, key)
        match.slots.extend(new)
        self.statistics.inserted_tokens += len(new) * self.unit

    def release(self, match: Match) -> None:
        """Queue the blocks up, the last one of the prompt first."""
        self.pool.free(match.slots)
        match.slots = []

    @property
    def stored_tokens(self) -> int:
        """Tokens of all blocks that have a key."""
        return len(self.pool.block_of) * self.unit

    def _allocate(self) -> int | None:
        allocated = self.pool.allocate()
        if allocated is None:
            return None
        if allocated.evicted is not None:
            self.statistics.evicted_tokens += self.unit
            if self.host is not None and self.host.put(allocated.evicted, allocated.block):
                self.statistics.spilled_tokens += self.unit
        return allocated.block

    def _bring(self, chained: list[_Device | _Host]) -> list[int]:
        """Blocks of the chain, fetched to the device, as far as one is free there."""
        blocks: list[int] = []
        for place, link in enumerate(chained):
            block = link.block if isinstance(link, _Device) else self._fetch(link)
            if block is None:
                self._let_go(chained[place:])
                break
            blocks.append(block)
        return blocks

    def _fetch(self, link: _Host) -> int | None:
        block = self._allocate()
        if block is not None and self.host is not None:
            self.host.give(link.place, block)
            self.pool.name(block, link.key)
            self.statistics.fetched_tokens += self.unit
        return block

    def _let_go(self, chained: list[_Device | _Host]) -> None:
        self.pool.free([link.block for link in chained if isinstance(link, _Device)])
        for link in chained:
            if isinstance(link, _Host) and self.host is not None:
                self.host.put_back(link.key, link.place)


class _Device(NamedTuple):
    """A block of a chain that is where it is needed."""

    block: int


class _Host(NamedTuple):
    """A block of a chain that has to be fetched."""

    key: bytes
    place: int
