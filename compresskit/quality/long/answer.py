"""Greedy answers through a cache.

    aware      [text question] ──► compressed ──► [lead] ──► answer
    agnostic   [text] ──► compressed ──► [question lead] ──► answer

Where a method looks at queries to choose what stays, the first shows it the question and the second does
not. A full cache answers alike both ways, but for rounding.

The lead (the beginning of the answer) is never part of the prefill: a prefill sees everything and is
compressed afterwards, so a first word of an answer that it predicted itself would have cost nothing,
whatever the method.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from compresskit.errors import RunError
from compresskit.hf.cache import cache_bytes
from compresskit.quality.long.draft import string_match_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.quality.long.prompts import Prompt, Question
    from compresskit.system import System

_BEFORE = " \n\t:*-"
"""What may stand between the lead and the answer: some models begin a list on a line of its own."""

When = Literal["aware", "agnostic"]


class Answer(NamedTuple):
    """What a system said to all questions of one prompt."""

    score: float
    """Share of all references that were given in answer to their own question."""
    length: int
    """Tokens of all answers."""
    sha256: str
    """First 16 hex digits of the hash of the token ids."""
    held: int
    """Bytes of the cache after the prefill that it was compressed in."""
    seen: int
    """Tokens of that prefill."""


@torch.inference_mode()
def answer(system: System, prompt: Prompt, when: When) -> Answer:
    """Answer the questions of `prompt`, one after the other, in one cache.

    Raises:
        RunError: a logit is not finite.
    """
    first, *later = prompt.questions
    with system.attached():
        talk = _Talk(system, prompt.room)
        first_pass = (*prompt.context, *(first.asked if when == "aware" else ()))
        talk.prefill(first_pass)
        held = talk.bytes()
        talk.read(first.lead if when == "aware" else (*first.asked, *first.lead))
        said = [talk.speak(first)]
        for question in later:
            talk.read((*question.asked, *question.lead))
            said.append(talk.speak(question))
    decode = system.tokenizer.decode
    hits, wanted = 0.0, 0
    for question, tokens in zip(prompt.questions, said, strict=True):
        count = len(question.references)
        hits += count * string_match_all(decode(tokens), question.references)
        wanted += count
    digest = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
    return Answer(hits / wanted, sum(map(len, said)), digest, held, len(first_pass))


class _Talk:
    """One sequence going through a cache."""

    def __init__(self, system: System, room: int) -> None:
        self.system, self.cache = system, system.new_cache(room)
        self.unread: list[int] = []

    def bytes(self) -> int:
        return sum(cache_bytes(self.cache).values())

    def prefill(self, tokens: Sequence[int]) -> None:
        row = torch.tensor([tokens], device=self.system.device.torch)
        self.logits = self.system.step(self.system.prompt(row), self.cache)

    def read(self, tokens: Sequence[int]) -> None:
        """Feed tokens behind what was said."""
        row = torch.tensor([[*self.unread, *tokens]], device=self.system.device.torch)
        self.logits = self.system.step(row, self.cache)
        self.unread = []

    def speak(self, question: Question) -> list[int]:
        """The likeliest tokens up to the end of the answer, an end token or as many as allowed."""
        said: list[int] = []
        while len(said) < question.most:
            if self.unread:
                self.read(())
            if not bool(torch.isfinite(self.logits[0, -1]).all()):
                raise RunError(
                    "the logits are not finite, so there is no answer. Try a wider dtype; if that "
                    "does not help, the method breaks this model."
                )
            token = int(self.logits[0, -1].argmax())
            if token in self.system.tokenizer.eos_ids:
                break
            said.append(token)
            line, end, _ = (
                self.system.tokenizer.decode(said).lstrip(_BEFORE).partition(question.end)
            )
            if line and end:
                # The next question begins with a line break of its own.
                break
            self.unread = [token]
        return said
