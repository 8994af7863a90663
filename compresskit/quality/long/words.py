"""Common words: which words of a long list are repeated most?

Every word but the common ones appears as often as the others; a common one appears `_OFTEN` times as often.
What has to be remembered is spread over the whole text, so no depth can be chosen.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING

from compresskit.quality.long.dice import Dice
from compresskit.quality.long.draft import Ask, Draft, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.quality.long.draft import Piece

_OFTEN = 8
_ENGLISH = (
    "apple", "bridge", "candle", "desert", "engine", "feather", "garden", "hammer", "island",
    "jacket", "kitchen", "letter", "mountain", "needle", "orange", "pencil", "queen", "rabbit",
    "saddle", "table", "umbrella", "valley", "window", "yellow", "zebra", "anchor", "basket",
    "carpet", "dragon", "eagle", "forest", "guitar", "harbour", "insect", "jungle", "kettle",
    "ladder", "market", "napkin", "ocean", "palace", "quarry", "river", "silver", "tunnel",
    "uncle", "village", "wagon", "yard", "button", "castle", "doctor", "elephant", "finger",
    "glacier", "helmet", "iceberg", "jewel", "knife", "lemon", "mirror", "nephew", "oyster",
    "parrot", "rocket", "shadow", "temple", "violin", "walnut", "autumn", "blanket", "cherry",
    "dinner",
)  # fmt: skip
_TINY = (
    "garden", "forest", "river", "market", "beach", "hill", "farm", "station", "kite", "lamp",
    "ball", "drum", "map", "boat", "basket", "bell", "coat", "flute", "tree", "bench", "bridge",
    "stone", "table", "cart", "wall", "gate", "apples", "pears", "nuts", "eggs", "plums",
    "rolls", "beans", "cakes", "figs",
)  # fmt: skip


def common_words(dice: Dice, needles: int, depth: float) -> Draft:
    """`needles` common words among some seventy others."""
    return _draft(dice, needles, _ENGLISH, intro="Here is a list of words.\n")


def tiny_common_words(dice: Dice, needles: int, depth: float) -> Draft:
    """The same with words that the tiny models know; counting is nothing that they were taught."""
    return _draft(dice, needles, _TINY, intro="")


def _draft(dice: Dice, needles: int, vocabulary: Sequence[str], intro: str) -> Draft:
    shuffled = dice.sample(vocabulary, len(vocabulary))
    common, rest = shuffled[:needles], shuffled[needles:]
    seed = dice.number(0, 2**31)

    def pieces(units: int) -> list[Piece]:
        each = max(2, round(_OFTEN * units / len(rest)))
        told = [word for word in common for _ in range(each)]
        anywhere = Dice(seed)
        return place(islice(cycle(rest), units), told, [anywhere.share() for _ in told])

    question = Ask(
        f"Question: Which {needles} words are the most common in the list?",
        f"The {needles} most common words are:",
        tuple(common),
    )
    return Draft(pieces=pieces, asks=(question,), intro=intro, joint=", ", around=", ")
