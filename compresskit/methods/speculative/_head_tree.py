r"""From heads to drafts: a tree whose shape is fixed, filled with each head's best candidates.

            newest token
           /     |      \           head 1: ranks 0, 1, 2
          0      1       2
        / | \    |                  head 2: ranks 0, 1, 2 under the likeliest
       0  1  2   0

Heads see the same feature and not each other's choice, so every combination of their candidates is a
guess; a node is worth the product of the accuracies along its path, and the most valuable nodes
that hang together are taken (Cai et al. 2024, Medusa, arXiv 2401.10774).
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.methods.speculative._draft import NOTHING, ROOT, Draft
from compresskit.methods.speculative._heads import Heads, logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from compresskit.methods.speculative._draft import Evidence


class Node(NamedTuple):
    """One place of the tree: below which node, which head's candidate, of which rank."""

    parent: int
    head: int
    rank: int


def grow(accuracy: Sequence[Sequence[float]], nodes: int) -> list[Node]:
    """The `nodes` most valuable nodes, parents first; fewer where no others are ever right."""
    tree: list[Node] = []
    # Value (negative: the heap gives the smallest), a number that breaks ties, and the node.
    open_nodes: list[tuple[float, int, Node, float]] = []
    pushed = 0

    def push(parent: int, above: float, head: int, rank: int) -> None:
        nonlocal pushed
        if head < len(accuracy) and rank < len(accuracy[head]):
            value = above * accuracy[head][rank]
            if value > 0:
                heapq.heappush(open_nodes, (-value, pushed, Node(parent, head, rank), above))
                pushed += 1

    push(ROOT, 1.0, 0, 0)
    while open_nodes and len(tree) < nodes:
        value, _, node, above = heapq.heappop(open_nodes)
        tree.append(node)
        push(node.parent, above, node.head, node.rank + 1)
        push(len(tree) - 1, -value, node.head + 1, 0)
    return tree


class HeadsDrafter:
    """Fills the tree with what the heads make of the feature under the newest logits."""

    wants_features = True

    def __init__(self, heads: Heads, top: nn.Module, tree: Sequence[Node]) -> None:
        """Draft with `heads` in front of the model's own head `top`."""
        self.heads, self.top, self.tree = heads, top, list(tree)
        self.ranks = max((node.rank for node in tree), default=0) + 1
        self.newest: torch.Tensor | None = None
        """`[B, E]`: the feature from which each row's newest token was said."""

    def observe(self, new: Sequence[Sequence[int]], evidence: Evidence | None = None) -> None:
        """Remember the feature under the last place of each row that stays."""
        if evidence is None or evidence.features is None:
            return
        last = [places[-1] if places else 0 for places in evidence.kept]
        # A copy: a replayed graph writes its next features to the same place.
        self.newest = evidence.features[torch.arange(len(last)), torch.tensor(last)].clone()

    def draft(self, limits: Sequence[int]) -> list[Draft]:
        """Fill the tree of every row that may draft, down to its limit."""
        if self.newest is None or not self.tree or max(limits) < 1:
            return [NOTHING] * len(limits)
        said = logits(self.heads, self.top, self.newest)
        best: list[list[list[int]]] = said.topk(self.ranks, -1).indices.tolist()
        return [
            self._fill([of_head[row] for of_head in best], limit)
            for row, limit in enumerate(limits)
        ]

    def memory_bytes(self) -> int:
        """Bytes kept between steps."""
        return 0 if self.newest is None else self.newest.nbytes

    def _fill(self, best: list[list[int]], limit: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        places = {ROOT: ROOT}
        for index, node in enumerate(self.tree):
            if node.head < limit:
                places[index] = len(tokens)
                tokens.append(best[node.head][node.rank])
                parents.append(places[node.parent])
        return Draft(tokens, parents=parents) if tokens else NOTHING
