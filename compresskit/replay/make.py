"""Traces whose prompts begin alike, cut from natural text.

few_shot   shared | own       one preamble of examples, then a question each
chat       system | turn | answer | turn ...   conversations take turns, each prompt holds its history
agent      tools | task | observation | observation ...   one task after the other, each a growing log

Every piece is another stretch of the text, so prompts share what they are meant to share and nothing
else. Lengths are in words: how many tokens that is depends on the model's tokenizer.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal, NamedTuple

from compresskit import text as texts
from compresskit.errors import InputError
from compresskit.replay.trace import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["chat", "few_shot", "agent"]


class Shape(NamedTuple):
    """How long a trace is, and its parts."""

    requests: int = 24
    shared: int = 300
    """Words that every prompt begins with."""
    own: int = 30
    """Words that each request adds."""
    groups: int = 4
    """Conversations, or tasks."""
    new_tokens: int = 8


def make(kind: Kind, shape: Shape, *, source: str = "embedded", seed: int = 0) -> list[Entry]:
    """Make a trace of `kind` from the text called `source`.

    Raises:
        InputError: the text is unusable or too short.
    """
    if shape.groups > shape.requests:
        raise InputError(
            f"{shape.groups} groups cannot share {shape.requests} requests: ask for more requests or "
            "fewer groups."
        )
    pieces = _Pieces(source, seed)
    prompts = {"chat": _chat, "few_shot": _few_shot, "agent": _agent}[kind](shape, pieces)
    return [Entry(prompt, shape.new_tokens) for prompt in prompts]


class _Pieces:
    """Stretches of one text, none of them twice."""

    def __init__(self, source: str, seed: int) -> None:
        self._source = source
        words = texts.load(source).content.split()
        start = random.Random(seed).randrange(len(words))
        self._words = words[start:] + words[:start]
        self._next = 0

    def take(self, count: int) -> str:
        """The next `count` words."""
        piece = self._words[self._next : self._next + count]
        self._next += count
        if len(piece) < count:
            raise InputError(
                f"{self._source} has {len(self._words)} words, too few for this trace. Use a longer "
                "text (docstrings has a hundred thousand), or fewer or shorter requests."
            )
        return " ".join(piece)


def _few_shot(shape: Shape, pieces: _Pieces) -> Iterator[str]:
    head = pieces.take(shape.shared)
    for _ in range(shape.requests):
        yield f"{head}\n\nQuestion: {pieces.take(shape.own)}\nAnswer:"


def _chat(shape: Shape, pieces: _Pieces) -> Iterator[str]:
    head = pieces.take(shape.shared)
    histories = [head] * shape.groups
    for request in range(shape.requests):
        group = request % shape.groups
        prompt = f"{histories[group]}\n\nUser: {pieces.take(shape.own)}\n\nAssistant:"
        yield prompt
        # The trace has an answer of its own: what the model says differs from model to model.
        histories[group] = f"{prompt} {pieces.take(shape.own)}"


def _agent(shape: Shape, pieces: _Pieces) -> Iterator[str]:
    head = pieces.take(shape.shared)
    for group in range(shape.groups):
        log = f"{head}\n\nTask: {pieces.take(shape.own)}\nThought:"
        # The first tasks take what does not divide.
        extra = group < shape.requests % shape.groups
        for _ in range(shape.requests // shape.groups + extra):
            yield log
            log = f"{log} {pieces.take(shape.own)}\nObservation: {pieces.take(shape.own)}\nThought:"
