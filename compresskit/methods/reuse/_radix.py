"""Prefixes as a radix tree over tokens, the way SGLang keeps them.

    root ── "You are a helpful" ─┬─ "assistant. Add 2 and 2" ── ...
                                 └─ "pirate. Sing"

An edge holds the tokens that all texts below it share, and the slot of each. A text that leaves an
edge halfway splits it, so a match is exact to the token. Room is made by dropping whole leaves, the
least recently used one first; a node whose last child goes becomes a leaf itself.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from compresskit.methods.reuse._store import Match, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.methods.reuse._store import Write


class Node:
    """A piece of text, after the text of its parents."""

    __slots__ = ("children", "holders", "parent", "slots", "tokens", "used")

    def __init__(self, parent: Node | None, tokens: list[int], slots: list[int], used: int) -> None:
        """Have no children; `used` is when it was last used, in requests."""
        self.parent, self.tokens, self.slots, self.used = parent, tokens, slots, used
        self.children: dict[int, Node] = {}
        self.holders = 0


class RadixStore(Store):
    """Stores every token of prompts, one slot each."""

    def __init__(self, slots: int, identity: str) -> None:
        """Be empty."""
        super().__init__(slots, 1, identity)
        self._roots: dict[str, Node] = {}
        self._free = list(reversed(range(slots)))
        self._clock = 0

    def lookup(self, tokens: Sequence[int], salt: str = "") -> Match:
        """Walk down as far as the text agrees, and split the edge where it stops."""
        self._clock += 1
        tokens = list(tokens)
        node = self._roots.setdefault(salt, Node(None, [], [], self._clock))
        slots: list[int] = []
        while len(slots) < len(tokens) and (child := node.children.get(tokens[len(slots)])):
            same = _agree(child.tokens, tokens, len(slots))
            if same < len(child.tokens):
                child = self._split(child, same)
            child.used = self._clock
            slots.extend(child.slots)
            node = child
        node.holders += 1
        return Match(tokens, slots, len(slots), held=node)

    def extend(self, match: Match, write: Write) -> None:
        """Hang the rest of the text below the match; its end is left out if there is no room."""
        rest = match.tokens[match.length :]
        self._make_room(len(rest))
        rest = list(rest[: len(self._free)])
        if not rest:
            return
        slots = [self._free.pop() for _ in rest]
        try:
            write(slots)
        except BaseException:
            self._free.extend(reversed(slots))
            raise
        match.held.children[rest[0]] = Node(match.held, rest, slots, self._clock)
        self.statistics.inserted_tokens += len(rest)

    def release(self, match: Match) -> None:
        """Let the end of the match be dropped again."""
        match.held.holders -= 1

    @property
    def stored_tokens(self) -> int:
        """Slots in use."""
        return self.slots - len(self._free)

    def _split(self, node: Node, at: int) -> Node:
        """Cut an edge after `at` tokens; returns the upper part, the lower one stays `node`."""
        parent = node.parent
        if parent is None:
            raise ValueError("the root has no edge to split")
        upper = Node(parent, node.tokens[:at], node.slots[:at], node.used)
        parent.children[upper.tokens[0]] = upper
        node.parent, node.tokens, node.slots = upper, node.tokens[at:], node.slots[at:]
        upper.children[node.tokens[0]] = node
        return upper

    def _make_room(self, wanted: int) -> None:
        """Drop leaves until `wanted` slots are free, or only what is held is left."""
        if len(self._free) >= wanted:
            return
        # The number keeps nodes out of comparisons.
        heap = [
            (leaf.used, number, leaf) for number, leaf in enumerate(self._leaves()) if leaf.parent
        ]
        heapq.heapify(heap)
        number = len(heap)
        while heap and len(self._free) < wanted:
            _, _, leaf = heapq.heappop(heap)
            parent = leaf.parent
            if leaf.holders or parent is None:
                continue
            self._free.extend(reversed(leaf.slots))
            self.statistics.evicted_tokens += len(leaf.slots)
            del parent.children[leaf.tokens[0]]
            if not parent.children and parent.parent is not None:
                number += 1
                heapq.heappush(heap, (parent.used, number, parent))

    def _leaves(self) -> list[Node]:
        queue, leaves = list(self._roots.values()), []
        while queue:
            node = queue.pop()
            queue.extend(node.children.values())
            if not node.children:
                leaves.append(node)
        return leaves


def _agree(edge: list[int], tokens: list[int], start: int) -> int:
    """How many tokens of `edge` are those of `tokens` from `start` on."""
    piece = tokens[start : start + len(edge)]
    if piece == edge:
        return len(edge)
    low, high = 0, min(len(edge), len(piece))
    # Slices are compared at once, tokens one by one: halve.
    while low < high:
        middle = (low + high + 1) // 2
        if edge[low:middle] == piece[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
