"""A model of the target's vocabulary as drafter: it says token after token how it would go on.

    text ──read──► logits ──► x1 ──say──► logits ──► x2 ──say──► logits ──► x3

The last guess is not read: whether it stays is known only after the target's pass. Sampled requests
draw each guess, at the request's own temperature and filters, and hand over the distribution that it
was drawn from; greedy ones take the arg max, which is certain.

With `branches` the likeliest first tokens are all followed, each by its own arg max:

    x1 ─► x2 ─► x3        one pass of the draft a level, over the whole tree so far: the tree is read,
    y1 ─► y2 ─► y3        and forgotten again, since the cache of a text has no place for two futures
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit.errors import InputError
from compresskit.hf.load import has_windows
from compresskit.methods.speculative._draft import NOTHING, ROOT, Draft
from compresskit.methods.speculative._reader import Reader
from compresskit.sampling import generator_for, probabilities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.methods.speculative._draft import Evidence
    from compresskit.system import Request, System

STREAM = 0x9E3779B97F4A7C15
"""Added to the request's seed: guesses drawn with the verifier's own random numbers would depend on
what it says."""
WIDTHS: tuple[int, ...] = (1, 2)
"""Tokens per row of a draft model's passes: guess after guess, and after a draft that was accepted
whole its last guess with the target's own token."""


class ModelDrafter:
    """Drafts with `system`, whose token ids are the target's; one chain per row.

    A text that outgrows the model's context, or holds an id that it does not know, gets no drafts
    any more.
    """

    wants_features = False

    def __init__(self, system: System, request: Request, *, draft: int, branches: int = 1) -> None:
        """Draft at most `draft` tokens deep for each row of `request`, in so many `branches`.

        Raises:
            InputError: the rows of a batch would not fit the model's windows.
        """
        refuse_windows(system, request)
        self.sampling = request.sampling
        self.limit, self.branches = draft, branches
        self.texts: list[list[int]] = [[] for _ in request.tokens]
        device = system.device.torch
        self.generator = generator_for((request.seed + STREAM) % 2**63, device, request.sampling)
        longest = request.tokens.shape[-1] + request.max_new_tokens
        self.reader = Reader(system, room=min(system.context, longest))
        self.known = int(system.model.config.get_text_config().vocab_size)
        self.strange = [False] * len(self.texts)
        self.vocabulary = self.known
        """Size of the target's logits; padding of the embedding may differ between the two."""

    def observe(self, new: Sequence[Sequence[int]], evidence: Evidence | None = None) -> None:
        """Append what was said; it is read when the next draft is asked for."""
        if evidence is not None:
            self.vocabulary = evidence.logits.shape[-1]
        for row, tokens in enumerate(new):
            self.texts[row] += tokens
            self.strange[row] |= any(token >= self.known for token in tokens)

    def draft(self, limits: Sequence[int]) -> list[Draft]:
        """Say at most so many tokens in each row."""
        depths = [self._depth(row, limit) for row, limit in enumerate(limits)]
        if not any(depths):
            return [NOTHING] * len(depths)
        logits = self.reader.read(
            [text if depth else None for text, depth in zip(self.texts, depths, strict=True)]
        )
        if self.branches > 1:
            return self._trees(resized(logits, self.vocabulary), depths)
        said: list[list[int]] = []
        laws: list[torch.Tensor] = []
        for place in range(1, max(depths) + 1):
            said.append(self._choose(logits, laws))
            if place < max(depths):
                logits = self.reader.say(
                    [
                        token if place < depth else None
                        for token, depth in zip(said[-1], depths, strict=True)
                    ]
                )
        return [
            Draft(
                [tokens[row] for tokens in said[:depth]],
                torch.stack([law[row] for law in laws[:depth]]) if laws and depth else None,
            )
            for row, depth in enumerate(depths)
        ]

    def memory_bytes(self) -> int:
        """Bytes of the draft's own cache."""
        return self.reader.memory_bytes()

    def _depth(self, row: int, limit: int) -> int:
        """How many tokens to say in a row: the last one is not read and needs no room."""
        if self.strange[row]:
            return 0
        free = self.reader.system.context - len(self.texts[row]) + 1
        return max(min(limit, self.limit, free), 0)

    def _trees(self, logits: torch.Tensor, depths: list[int]) -> list[Draft]:
        """Follow the best first tokens of each row: `depths[row]` levels, certain whatever is drawn."""
        count = min(self.branches, logits.shape[-1])
        tips: list[list[int]] = logits.topk(count, -1).indices.tolist()
        trees = [Draft([], parents=[]) for _ in depths]
        for level in range(1, max(depths) + 1):
            for tree, depth, row in zip(trees, depths, tips, strict=True):
                if level <= depth and tree.parents is not None:
                    size = len(tree.tokens)
                    tree.parents.extend(
                        ROOT if level == 1 else size - count + place for place in range(count)
                    )
                    tree.tokens.extend(row)
            if level < max(depths):
                after = self.reader.look(
                    [
                        tree if level < depth else NOTHING
                        for tree, depth in zip(trees, depths, strict=True)
                    ]
                )
                newest = after[:, (level - 1) * count : level * count, : self.vocabulary]
                tips = newest.argmax(-1).tolist()
        return [tree if tree.tokens else NOTHING for tree in trees]

    def _choose(self, logits: torch.Tensor, laws: list[torch.Tensor]) -> list[int]:
        """One token for each row; what it was drawn from `[B, V]` joins `laws`."""
        logits = resized(logits, self.vocabulary)
        if self.sampling.temperature == 0:
            certain: list[int] = logits.argmax(-1).tolist()
            return certain
        law = probabilities(logits, self.sampling)
        laws.append(law)
        drawn: list[int] = torch.multinomial(law, 1, generator=self.generator)[:, 0].tolist()
        return drawn


def resized(logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits `[B, vocabulary]`: ids that only one of two models has are cut off, or cannot come."""
    missing = vocabulary - logits.shape[-1]
    if missing <= 0:
        return logits[:, :vocabulary]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


def refuse_windows(system: System, request: Request) -> None:
    """Raise `InputError` for a batch whose draft model has sliding windows."""
    if len(request.tokens) > 1 and has_windows(system.model.config.to_dict()):
        raise InputError(
            "rows of a batch grow apart, which the sliding windows of the draft model cannot follow. "
            "Use batch size 1 or a draft without windows."
        )
