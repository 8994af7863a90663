"""What a drafter hands to the loop, and what it is told in return.

    drafter ──► Draft: tokens, where each hangs (chain or tree), what it was drawn from
       ▲                                   │
       └── Evidence: block, logits, kept ◄─┘ one pass of the target

The q of a draft is a contract, not a hint: the distribution *after* all filters of the sampling from
which the tokens were really drawn. A guess that was not drawn (a lookup, the arg max of a smaller
model) is certain and has no q. Whoever draws from one distribution and hands over another makes a
biased loop whose greedy output is still right; `compresskit audit` exists to find that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ROOT = -1
"""Parent of the tokens that would follow the newest one."""


class Draft(NamedTuple):
    """Guessed tokens, and the distributions they were drawn from.

    q: float `[k, V]` after all filters of the sampling; None when the guess was certain (one-hot).
    parents: index of the token that each one follows, `ROOT` for none, parents before children, no
    two equal tokens under one parent; None for a chain. Trees are certain: they have no q. match:
    tokens of the text that a lookup went by, 0 where there is no such length; how often drafts of
    that kind are right may be judged by it.
    """

    tokens: list[int]
    q: torch.Tensor | None = None
    parents: list[int] | None = None
    match: int = 0

    def follows(self) -> list[int]:
        """Parent of every token, chains included."""
        return list(range(ROOT, len(self.tokens) - 1)) if self.parents is None else self.parents

    def depths(self) -> list[int]:
        """1 for what would follow the newest token, 2 for what would follow that, ..."""
        found: list[int] = []
        for parent in self.follows():
            found.append(1 if parent == ROOT else found[parent] + 1)
        return found

    def down_to(self, depth: int) -> Draft:
        """The tokens at most so deep; in which order they were written does not matter."""
        if self.parents is None:
            q = None if self.q is None else self.q[:depth]
            return self._replace(tokens=self.tokens[:depth], q=q)
        kept = [place for place, deep in enumerate(self.depths()) if deep <= depth]
        at = {place: new for new, place in enumerate(kept)} | {ROOT: ROOT}
        return self._replace(
            tokens=[self.tokens[place] for place in kept],
            parents=[at[self.parents[place]] for place in kept],
        )


NOTHING = Draft([])


class Evidence(NamedTuple):
    """What the target said in one pass, row by row.

    blocks: the tokens of the pass, the newest token of the text first, then the draft (after the
    prompt: its last token alone). logits `[B, T, V]` after each of them; features `[B, T, E]`, the
    hidden states under these logits, if the drafter `wants_features`. kept: places in the block that
    are part of the text now, 0 first. Rows are padded at the end.
    """

    blocks: list[list[int]]
    logits: torch.Tensor
    kept: list[list[int]]
    features: torch.Tensor | None = None


class Drafter(Protocol):
    """Guesses how the texts of a batch go on; made anew for each request.

    Lists have an entry per row. A row that has ended is told nothing and asked for nothing.
    """

    wants_features: bool

    def observe(self, new: Sequence[Sequence[int]], evidence: Evidence | None = None) -> None:
        """Learn the next tokens of each text: first the prompts (no evidence), then each pass's."""

    def draft(self, limits: Sequence[int]) -> list[Draft]:
        """Guess at most so many tokens deep in each row; nothing is a fine answer."""


@runtime_checkable
class Weighed(Protocol):
    """A drafter, of a batch or of a row, that can tell what it holds."""

    def memory_bytes(self) -> int | None:
        """Bytes of its tables, texts and caches; None if a part of it does not tell.

        The weights of a draft model count among the weights, not here.
        """


def memory_bytes(drafter: object) -> int | None:
    """What a drafter says it holds, or None."""
    return drafter.memory_bytes() if isinstance(drafter, Weighed) else None


class RowDrafter(Protocol):
    """Guesses from one text and nothing else."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Learn the next tokens of the text."""

    def draft(self, limit: int) -> Draft:
        """Guess at most so many tokens deep."""


class EachRow:
    """A drafter of a batch, made of one for every row."""

    wants_features = False

    def __init__(self, rows: Sequence[RowDrafter]) -> None:
        """One drafter per row, in order."""
        self.rows = rows

    def observe(self, new: Sequence[Sequence[int]], evidence: Evidence | None = None) -> None:
        """Tell every row its own."""
        for row, tokens in zip(self.rows, new, strict=True):
            row.observe(tokens)

    def draft(self, limits: Sequence[int]) -> list[Draft]:
        """Ask every row that may draft."""
        return [
            row.draft(limit) if limit > 0 else NOTHING
            for row, limit in zip(self.rows, limits, strict=True)
        ]

    def memory_bytes(self) -> int | None:
        """Of all rows together."""
        held = [memory_bytes(row) for row in self.rows]
        return None if None in held else sum(filter(None, held))
