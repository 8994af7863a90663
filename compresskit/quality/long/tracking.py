"""Variable tracking: a chain of assignments scattered over the text, in their order.

The variable KBT is set to 48213. ... The variable RXF is set to KBT. ... Which variables hold 48213?
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from compresskit.quality.long import english, tinytext
from compresskit.quality.long.draft import Ask, Draft, place

if TYPE_CHECKING:
    from compresskit.quality.long.dice import Dice

_INTRO = (
    "Variables are set in the following text. Remember their values. Where the variable QAA is set to "
    "10101 and the variable QBB is set to QAA, the 2 variables with the value 10101 are: QAA, QBB.\n"
)
"""With an example, as a model that only completes texts needs one."""


def variable_tracking(dice: Dice, needles: int, depth: float) -> Draft:
    """Name all variables of a chain of `needles` links."""
    names, (value,) = english.variables(dice, needles), english.codes(dice, 1)
    told = [
        f"The variable {name} is set to {source}." for source, name in pairwise([value, *names])
    ]
    depths, filler = _depths(dice, needles, depth), english.Filler(dice)
    question = Ask(
        f"Question: Which {needles} variables have the value {value} in the end?",
        f"The {needles} variables with the value {value} are:",
        tuple(names),
    )
    return Draft(
        pieces=lambda units: place(filler(units), told, depths),
        asks=(question,),
        intro=_INTRO,
        depth=depth,
    )


def tiny_variable_tracking(dice: Dice, needles: int, depth: float) -> Draft:
    """A chain of pets: Tom's is a fox, Ann's is Tom, ...; each link is asked for, from the last back."""
    names = dice.sample(tinytext.NAMES, needles)
    chain = list(pairwise([dice.pick(tinytext.VALUES["pet"]), *names]))
    told = [tinytext.note("pet", name, value) for value, name in chain]
    depths, filler = _depths(dice, needles, depth), tinytext.Filler(dice)
    return Draft(
        pieces=lambda units: place(filler(units), told, depths),
        asks=tuple(tinytext.ask("pet", name, value) for value, name in reversed(chain)),
        around=tinytext.AROUND,
        glue=tinytext.GLUE,
        depth=depth,
    )


def _depths(dice: Dice, count: int, first: float) -> list[float]:
    """The first link where it is wanted, the others in order behind it."""
    return [first, *sorted(first + (1 - first) * dice.share() for _ in range(count - 1))]
