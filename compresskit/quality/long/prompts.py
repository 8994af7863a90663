"""From a draft to token ids: as long as asked for, cut where the question begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from compresskit.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.quality.long.draft import Ask, Draft
    from compresskit.system import Tokenizer

_SLACK = 8
"""Tokens that an answer may be longer than twice its references: answers grow under compression."""


class Question(NamedTuple):
    """A question in tokens."""

    asked: tuple[int, ...]
    lead: tuple[int, ...]
    """The beginning of its answer."""
    references: tuple[str, ...]
    most: int
    """Tokens that the answer may take."""

    @property
    def end(self) -> str:
        """What ends the answer: the line, or a blank one, since some models list things on lines."""
        return "\n" if len(self.references) == 1 else "\n\n"


@dataclass(frozen=True)
class Prompt:
    """One prompt in tokens."""

    context: tuple[int, ...]
    """The text, with whatever the tokenizer puts in front."""
    without: tuple[int, ...]
    """The text without its needles."""
    questions: tuple[Question, ...]
    depth: float | None

    @property
    def length(self) -> int:
        """Tokens of the text, of its first question and of the beginning of the answer."""
        first = self.questions[0]
        return len(self.context) + len(first.asked) + len(first.lead)

    @property
    def room(self) -> int:
        """Tokens that a cache has to hold in the end."""
        return len(self.context) + sum(len(q.asked) + len(q.lead) + q.most for q in self.questions)

    def over(self, context: tuple[int, ...]) -> Prompt:
        """The same questions about another text."""
        return replace(self, context=context)


def build(tokenizer: Tokenizer, draft: Draft, tokens: int, *, chat: bool) -> Prompt:
    """Give `draft` as many filler units as fit into `tokens`, the first question included.

    Raises:
        SpecError: needles and question alone take more.
        InputError: `chat` is asked of a tokenizer without a chat template.
    """
    first = draft.asks[0]

    def cut(units: int, *, needles: bool = True) -> Parts:
        text = draft.text(units, needles=needles)
        return _cut(tokenizer, text, first, draft.glue, chat=chat)

    def fits(units: int) -> bool:
        return sum(map(len, cut(units))) <= tokens

    if not fits(0):
        least = sum(map(len, cut(0)))
        raise SpecError(
            f"quality.tasks: needles and question alone take {least} tokens, more than the {tokens} "
            "of a prompt. Raise tokens, or lower needles."
        )
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    whole = cut(low)
    questions = [_question(tokenizer, first, whole.asked, whole.lead)]
    for ask in draft.asks[1:]:
        asked, lead = (
            tuple(tokenizer.encode(part, special=False))
            for part in (f"\n{ask.question}", f"{draft.glue}{ask.lead}")
        )
        questions.append(_question(tokenizer, ask, asked, lead))
    return Prompt(
        context=whole.text,
        without=cut(low, needles=False).text,
        questions=tuple(questions),
        depth=draft.depth,
    )


class Parts(NamedTuple):
    """A prompt in three parts, whose tokens together are those of the whole."""

    text: tuple[int, ...]
    asked: tuple[int, ...]
    lead: tuple[int, ...]


def _cut(tokenizer: Tokenizer, text: str, ask: Ask, glue: str, *, chat: bool) -> Parts:
    """Cut text, question and the beginning of the answer apart.

    The text ends where the tokens with and without a question part: so no token is made of both, and a
    chat template's beginning belongs to the text, its end to the question.
    """
    if chat:
        alone, asked = tokenizer.chat(text), tokenizer.chat(text + ask.question)
        whole = asked + tokenizer.encode(ask.lead, special=False)
    else:
        alone, asked = tokenizer.encode(text), tokenizer.encode(text + ask.question)
        whole = tokenizer.encode(f"{text}{ask.question}{glue}{ask.lead}")
    one, two = _shared(alone, whole), _shared(asked, whole)
    return Parts(tuple(whole[:one]), tuple(whole[one:two]), tuple(whole[two:]))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two sequences have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _question(
    tokenizer: Tokenizer, ask: Ask, asked: tuple[int, ...], lead: tuple[int, ...]
) -> Question:
    right = tokenizer.encode(" " + ", ".join(ask.references), special=False)
    return Question(asked, lead, ask.references, most=2 * len(right) + _SLACK)
