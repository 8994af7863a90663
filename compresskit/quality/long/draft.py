"""A prompt before its length is known: an introduction, pieces of text and the questions.

    intro  filler filler NEEDLE filler ... filler   question lead | answer
                         └ depth 0.3

A draft gives its pieces for any number of filler units, so that `prompts` can make it as long as a model's
tokenizer wants; needles keep their relative depth. Without its needles a draft is the negative control:
the same text, from which nobody can answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Ask(NamedTuple):
    """One question about the text."""

    question: str
    lead: str
    """Beginning of the answer, given to the model so that it goes on with the answer itself."""
    references: tuple[str, ...]
    """What a right answer holds."""


class Piece(NamedTuple):
    """A sentence, line or word of the text."""

    text: str
    needle: bool = False


@dataclass(frozen=True)
class Draft:
    """A prompt of any length."""

    pieces: Callable[[int], Sequence[Piece]]
    """The pieces with this many filler units."""
    asks: tuple[Ask, ...]
    """Questions, asked one after the other."""
    intro: str = ""
    joint: str = " "
    """What stands between two pieces of filler."""
    around: str = " "
    """What stands on both sides of a needle."""
    glue: str = "\nAnswer: "
    """What stands between a question and the beginning of its answer."""
    depth: float | None = None
    """Where the (first) needle lies, 0 to 1; None where it lies everywhere."""

    def text(self, units: int, *, needles: bool = True) -> str:
        """The text with that many filler units, up to the question."""
        pieces = [piece for piece in self.pieces(units) if needles or not piece.needle]
        parts = [self.intro, *(piece.text for piece in pieces[:1])]
        for before, piece in pairwise(pieces):
            parts += [self.around if before.needle or piece.needle else self.joint, piece.text]
        return "".join(parts) + "\n"


def place(filler: Iterable[str], needles: Sequence[str], depths: Sequence[float]) -> list[Piece]:
    """Put each needle in front of the filler unit at its depth; at equal depths in their order."""
    units = list(filler)
    at: dict[int, list[str]] = {}
    for needle, depth in zip(needles, depths, strict=True):
        at.setdefault(round(depth * len(units)), []).append(needle)
    found: list[Piece] = []
    for index in range(len(units) + 1):
        found += [Piece(needle, needle=True) for needle in at.get(index, ())]
        found += map(Piece, units[index : index + 1])
    return found


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of `references` that `answer` holds, upper and lower case alike (RULER's score).

    >>> string_match_all("they are Fox and owl.", ["fox", "owl", "dog", "cat"])
    0.5
    """
    said = answer.lower()
    return sum(one.lower() in said for one in references) / len(references)
