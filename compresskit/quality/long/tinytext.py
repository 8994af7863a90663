"""The language of the shipped tiny models: stories, notes and the questions about them.

    Note the pet: Mira fox.  ...  What is the pet of Mira? Mira fox.

Names, colours and animals are the ones that these models were trained on: a word of three tokens that
they never saw is a matter of spelling, not of memory. The haystack is the shipped held-out text, which
no training document shares an index with; only its stories are used, since its lists and notes would
answer questions of their own.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from compresskit import text as texts
from compresskit.quality.long.draft import Ask

if TYPE_CHECKING:
    from compresskit.quality.long.dice import Dice

NAMES = (
    "Mira", "Tom", "Ann", "Leo", "Zoe", "Ben", "Ida", "Max",
    "Eva", "Sam", "Kim", "Ned", "Lia", "Otto", "Ruth", "Finn",
)  # fmt: skip
VALUES = {
    "pet": ("fox", "dog", "cat", "owl", "horse", "mouse", "goose", "frog"),
    "box": ("red", "blue", "green", "yellow", "black", "white", "silver", "brown"),
}
AROUND, GLUE = "\n", " "
"""Notes stand on lines of their own; an answer follows its question."""

_STORY = re.compile(r"(One|Once|\w+ and) \w+.*\w+ .*\.")
_SENTENCE = re.compile(r'(?<=[.?!"]) (?=[A-Z"])')


@cache
def _sentences() -> tuple[str, ...]:
    documents = texts.load("embedded").content.split("\n\n")
    stories = [one for one in map(str.strip, documents) if _STORY.fullmatch(one)]
    return tuple(sentence for story in stories for sentence in _SENTENCE.split(story))


class Filler:
    """Sentences of held-out stories, from a random one on; after the last comes the first."""

    def __init__(self, dice: Dice) -> None:
        """Choose where to begin."""
        self._start = dice.number(0, len(_sentences()) - 1)

    def __call__(self, units: int) -> list[str]:
        """The first `units` sentences."""
        found = _sentences()
        return [found[(self._start + index) % len(found)] for index in range(units)]


def note(what: str, name: str, value: str) -> str:
    """State a fact."""
    return f"Note the {what}: {name} {value}."


def ask(what: str, name: str, value: str) -> Ask:
    """Ask for it; the answer names its key again, as the note does."""
    return Ask(f"What is the {what} of {name}?", name, (value,))
