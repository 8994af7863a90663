"""Token recycling: a tree of the successors that each token had in the model's mind when last seen.

    table   to ──► be 0, have 1, the 2          template        0
            be ──► or 0, at 1, able 2                        ┌──┴──┐
            ...                                              0     1 ...
                                                           ┌─┴─┐
    tree    to ┬ be ┬ or                                   0   1
               │    └ at
               └ have ── ...

After each pass the table takes the likeliest successors of every token in it, rejected ones too.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, final

import torch
from pydantic import Field, JsonValue

from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._draft import NOTHING, ROOT, Draft

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.method import Context
    from compresskit.methods.speculative._draft import Drafter, Evidence
    from compresskit.system import Request, System

UNKNOWN = -1
"""In the table: no successor is known."""


class Node(NamedTuple):
    """A place of the template."""

    depth: int
    parent: int
    """Index of the parent, or `ROOT`."""
    rank: int
    """Which of the parent's successors, 0 for the likeliest."""


def template(*, nodes: int, successors: int, depth: int) -> list[Node]:
    """The `nodes` places that are likeliest to be right, or all there are, level by level.

    Each successor is taken to be half as likely as the one before it, the first one 1/2: so the cost
    of a place is that of its parent plus its rank plus 1, and the cheapest places win.
    """
    queue: list[tuple[int, int, tuple[int, ...]]] = [(1, 1, (0,))]
    paths: list[tuple[int, ...]] = []
    while queue and len(paths) < nodes:
        cost, level, path = heapq.heappop(queue)
        paths.append(path)
        if path[-1] + 1 < successors:
            heapq.heappush(queue, (cost + 1, level, (*path[:-1], path[-1] + 1)))
        if level < depth:
            heapq.heappush(queue, (cost + 1, level + 1, (*path, 0)))
    paths.sort(key=lambda path: (len(path), path))
    places = {(): ROOT, **{path: place for place, path in enumerate(paths)}}
    return [Node(len(path), places[path[:-1]], path[-1]) for path in paths]


class Table:
    """The last seen likeliest successors of every token: int32 `[V, k]`, on the host."""

    def __init__(self, successors: int) -> None:
        """Know no token; the size of the vocabulary comes with the first logits."""
        self.successors = successors
        self.rows = torch.empty(0, successors, dtype=torch.int32)

    def learn(self, evidence: Evidence) -> None:
        """Take the successors of every token of the pass; what the text kept comes last and stays."""
        vocabulary = evidence.logits.shape[-1]
        if not len(self.rows):
            self.rows = torch.full((vocabulary, self.successors), UNKNOWN, dtype=torch.int32)
        newest: dict[int, tuple[int, int]] = {}
        for row, (block, kept) in enumerate(zip(evidence.blocks, evidence.kept, strict=True)):
            if not kept:  # the row has ended, and what is computed in its place means nothing
                continue
            stays = set(kept)
            for place in (*(i for i in range(len(block)) if i not in stays), *kept):
                newest[block[place]] = (row, place)
        if not newest:
            return
        rows, places = (list(index) for index in zip(*newest.values(), strict=True))
        found = evidence.logits[rows, places].topk(min(self.successors, vocabulary), dim=-1).indices
        self.rows[list(newest), : found.shape[-1]] = found.to("cpu", torch.int32)


class Recycler:
    """Drafts trees for the rows of a batch, which share one table."""

    wants_features = False

    def __init__(self, nodes: Sequence[Node], table: Table) -> None:
        """Fill places like `nodes` from `table`."""
        self.nodes, self.table = nodes, table
        self.newest: list[int] = []
        self.levels = list(_levels(nodes))

    def observe(self, new: Sequence[Sequence[int]], evidence: Evidence | None = None) -> None:
        """Note the newest token of each row, and learn from what the model said."""
        self.newest = self.newest or [0] * len(new)
        self.newest = [
            tokens[-1] if tokens else old for tokens, old in zip(new, self.newest, strict=True)
        ]
        if evidence is not None:
            self.table.learn(evidence)

    def draft(self, limits: Sequence[int]) -> list[Draft]:
        """The template, filled as far as the table knows and each limit allows."""
        if max(limits) < 1:
            return [NOTHING] * len(limits)
        level = torch.tensor(self.newest).unsqueeze(-1)
        levels: list[torch.Tensor] = []
        for parents, ranks in self.levels:
            before = level[:, parents]
            # What follows an unknown token is looked up somewhere, and unknown.
            level = self.table.rows[before.clamp(min=0), ranks].long()
            level = level.masked_fill(before < 0, UNKNOWN)
            levels.append(level)
        filled = torch.cat(levels, -1).tolist()
        return [self._tree(row, limit) for row, limit in zip(filled, limits, strict=True)]

    def memory_bytes(self) -> int:
        """Of the table; what else there is fits in it many times."""
        return int(self.table.rows.nbytes)

    def _tree(self, filled: Sequence[int], limit: int) -> Draft:
        """Leave out unknown places and those below `limit`, and count the rest anew."""
        places = {ROOT: ROOT}
        tokens: list[int] = []
        parents: list[int] = []
        for index, (node, token) in enumerate(zip(self.nodes, filled, strict=True)):
            if token != UNKNOWN and node.depth <= limit:
                places[index] = len(tokens)
                tokens.append(token)
                parents.append(places[node.parent])
        return Draft(tokens, parents=parents) if tokens else NOTHING


def _levels(nodes: Sequence[Node]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each level: place of the parent in the level above, and rank, of every node."""
    first = {depth: i for i, depth in reversed(list(enumerate(node.depth for node in nodes)))}
    for depth in sorted(first):
        level = [node for node in nodes if node.depth == depth]
        above = first.get(depth - 1, ROOT)
        yield (
            torch.tensor([node.parent - above for node in level]),
            torch.tensor([node.rank for node in level]),
        )


@final
class TokenRecycling(Speculative):
    """Draft a tree of successors that the model had in mind when it last saw each token.

    Paper: Luo et al. 2024, Token Recycling, arXiv 2408.08696.
    Differs: the template is computed, each successor taken to be half as likely as the one before;
    the table starts empty with each request unless `shared`, and is one for all rows of a batch; of
    the prompt the last token alone is learned from, since the prefill gives no other logits.
    Cost: one forward pass over 1 + nodes tokens instead of one; a table of 4 · V · successors bytes
    on the host, and the top `successors` logits of every token of each pass.
    """

    # Shared, or a short answer to a new prompt would hardly meet a draft.
    example: ClassVar[Mapping[str, JsonValue]] = {
        "draft": 4,
        "nodes": 16,
        "successors": 4,
        "shared": True,
    }
    trees: ClassVar[bool] = True

    nodes: int = Field(60, ge=1)
    """Most tokens of a tree, all branches together; `draft` bounds its depth."""
    successors: int = Field(8, ge=1)
    """Successors kept of every token."""
    shared: bool = False
    """Keep the table from request to request; results then depend on their order."""

    def widest(self) -> int:
        """As many tokens as the template has."""
        return len(self.template())

    def template(self) -> list[Node]:
        """The places of a full tree."""
        return template(nodes=self.nodes, successors=self.successors, depth=self.draft)

    def prepare(self, system: System, ctx: Context) -> System:
        """Say what the table takes; make it, if requests share it."""
        vocabulary = int(system.model.config.get_text_config().vocab_size)
        table: dict[str, JsonValue] = {
            "shared": self.shared,
            "bytes": 4 * vocabulary * self.successors,
            "tokens": vocabulary,
        }
        held = {**system.held, HELD: Table(self.successors)} if self.shared else system.held
        return replace(system, facts={**system.facts, "recycling_table": table}, held=held)

    def drafter(self, system: System, request: Request) -> Drafter:
        """One table for all rows: an empty one, or that of the requests before."""
        table = system.held[HELD] if self.shared else Table(self.successors)
        return Recycler(self.template(), table)


HELD = "speculative/token_recycling"
"""Where the system holds a shared table."""
