"""A model of another tokenizer as drafter: what passes between the two is text.

    target's ids ──decode──► text ──encode──► draft's ids ──► greedy continuation
                                                                      │
    guess ◄── cut ◄── encode behind the newest words ◄── text ◄── decode

Words may be split in another way than the target would split them; such a guess is rejected and
nothing else happens, since a guess without q is right whatever it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.methods.speculative._draft import NOTHING, Draft
from compresskit.methods.speculative._model_drafter import refuse_windows
from compresskit.methods.speculative._reader import Reader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.methods.speculative._draft import Evidence
    from compresskit.system import Request, System, Tokenizer

BEHIND = 8
"""Newest tokens that are encoded again with the guess, so that it joins them as the tokenizer would."""
PER_TOKEN = 4
"""Room for so many of the draft's tokens per token of the target; a text that needs more gets no
drafts any more."""
_CUT = "�"
"""What decoding makes of bytes that are no whole character."""


class TextDrafter:
    """Drafts with `system`, whose tokenizer is not that of `target`; one chain per row."""

    wants_features = False

    def __init__(
        self, system: System, target: Tokenizer, request: Request, *, draft: int, known: int
    ) -> None:
        """Say at most `draft` tokens a step for each row; ids from `known` on are none of the target's.

        Raises:
            InputError: the rows of a batch would not fit the model's windows.
        """
        refuse_windows(system, request)
        self.target, self.limit, self.known = target, draft, known
        self.texts: list[list[int]] = [[] for _ in request.tokens]
        longest = PER_TOKEN * (request.tokens.shape[-1] + request.max_new_tokens) + draft
        self.reader = Reader(system, room=min(system.context, longest))

    def observe(self, new: Sequence[Sequence[int]], evidence: Evidence | None = None) -> None:
        """Append what was said."""
        for text, tokens in zip(self.texts, new, strict=True):
            text += tokens

    def draft(self, limits: Sequence[int]) -> list[Draft]:
        """Continue every text that may be continued, and translate."""
        asked = [
            self._translated(text) if limit > 0 else None
            for text, limit in zip(self.texts, limits, strict=True)
        ]
        if not any(asked):
            return [NOTHING] * len(limits)
        logits = self.reader.read(asked)
        said: list[list[int]] = [[] for _ in asked]
        for place in range(self.limit):
            best: list[int] = logits.argmax(-1).tolist()
            for row, token in enumerate(best):
                if asked[row] is not None:
                    said[row].append(token)
            if place + 1 < self.limit:
                logits = self.reader.say([tokens[-1] if tokens else None for tokens in said])
        return [
            NOTHING if before is None else self._guess(text, before, tokens, limit)
            for text, before, tokens, limit in zip(self.texts, asked, said, limits, strict=True)
        ]

    def memory_bytes(self) -> int:
        """Bytes of the draft's own cache."""
        return self.reader.memory_bytes()

    def _translated(self, text: list[int]) -> list[int] | None:
        """The text in the draft's ids; None where it ends within a character or outgrows the room."""
        words = self.target.decode(text)
        ids = self.reader.system.tokenizer.encode(words) if words else []
        fits = 0 < len(ids) <= self.reader.room - self.limit
        return ids if fits and not words.endswith(_CUT) else None

    def _guess(self, text: list[int], before: list[int], said: list[int], limit: int) -> Draft:
        """What the draft said, in the target's ids."""
        tokenizer = self.reader.system.tokenizer
        known = tokenizer.decode(before[-BEHIND:])
        whole = tokenizer.decode(before[-BEHIND:] + said)
        if not whole.startswith(known):
            return NOTHING
        words = whole[len(known) :].rstrip(_CUT)
        newest = text[-BEHIND:]
        ids = self.target.encode(self.target.decode(newest) + words, special=False)
        # Where the newest tokens come out otherwise, the join is lost and the words stand alone.
        joined = ids[: len(newest)] == newest
        guess = ids[len(newest) :] if joined else self.target.encode(words, special=False)
        guess = guess[: min(limit, self.limit)]
        return Draft(guess) if guess and max(guess) < self.known else NOTHING
