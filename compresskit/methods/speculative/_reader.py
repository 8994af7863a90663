"""A draft model that reads along: several texts in its cache, each followed wherever it turns.

    held   the cat sat on the     what the cache has of one row: text, and guesses behind it
    text   the cat sat on a mat
           └── shared ──┘ └─ new

`read` forgets what is not shared, in all rows at once, and runs what is new. Whether a guess was
rejected, a bonus token came, or another tokenizer split the last word anew, is all the same to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit.decode import pad
from compresskit.hf.cache import cache_bytes
from compresskit.methods.speculative._draft import NOTHING, Draft
from compresskit.methods.speculative._rows import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.system import System


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with in common, by bisection over slices."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Reader:
    """Texts of a batch in a cache of `system`, read as far as they go."""

    def __init__(self, system: System, *, room: int) -> None:
        """Hold nothing yet; no text will have more than `room` tokens."""
        self.system = system
        self.room = room
        self.rows: Rows | None = None
        self.held: list[list[int]] = []
        """Tokens of each row that the cache has, in order."""

    def read(self, texts: Sequence[Sequence[int] | None]) -> torch.Tensor:
        """Return the logits `[B, V]` after each text; None leaves a row as it is, its logits mean nothing.

        The first time, a row that is left out gets one token, for a row cannot be empty.
        """
        places = [
            None if text is None else min(shared(held, text), len(text) - 1)
            for text, held in zip(texts, self.held or [[]] * len(texts), strict=True)
        ]
        # A row of which nothing stays would have no slot to see.
        if self.rows is None or 0 in places:
            return self._begin(texts)
        counts = [
            0 if place is None else len(held) - place
            for place, held in zip(places, self.held, strict=True)
        ]
        self.rows.forget(counts)
        for held, count in zip(self.held, counts, strict=True):
            del held[len(held) - count :]
        return self._extend(
            [
                [] if text is None else list(text[place:])
                for text, place in zip(texts, places, strict=True)
            ]
        )

    def say(self, tokens: Sequence[int | None]) -> torch.Tensor:
        """Append one token to each row that has one; logits `[B, V]` as from `read`."""
        return self._extend([[] if token is None else [token] for token in tokens])

    def look(self, trees: Sequence[Draft]) -> torch.Tensor:
        """Logits `[B, T, V]` after each token of a tree behind each text, which stays as it is."""
        assert self.rows is not None  # `read` comes first
        logits = self.rows.extend(trees)
        self.rows.keep([[] for _ in trees])
        return logits

    def memory_bytes(self) -> int:
        """Bytes that the cache holds now."""
        return 0 if self.rows is None else sum(cache_bytes(self.rows.cache).values())

    def _begin(self, texts: Sequence[Sequence[int] | None]) -> torch.Tensor:
        # What a row that is left out holds stays what it was.
        self.held = [
            list(text) if text is not None else held or [0]
            for text, held in zip(texts, self.held or [[]] * len(texts), strict=True)
        ]
        self.rows = Rows(self.system, max(self.room, *map(len, self.held)))
        tokens, mask = pad(self.held, device=self.system.device.torch)
        return self.rows.begin(tokens, mask)[:, -1]

    def _extend(self, new: Sequence[list[int]]) -> torch.Tensor:
        assert self.rows is not None  # `read` comes first
        logits = self.rows.extend([Draft(tokens) if tokens else NOTHING for tokens in new])
        for held, tokens in zip(self.held, new, strict=True):
            held += tokens
        last = torch.tensor([max(len(tokens) - 1, 0) for tokens in new], device=logits.device)
        return logits[torch.arange(len(new), device=logits.device), last]
