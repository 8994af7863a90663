"""Needles in a haystack: one, several of which one is asked for, several that are all asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.quality.long import english, tinytext
from compresskit.quality.long.draft import Ask, Draft, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.quality.long.dice import Dice

_INTRO = "Some access codes are hidden in the following text. Remember them.\n"


def single(dice: Dice, needles: int, depth: float) -> Draft:
    """One needle."""
    return _multikey(dice, 1, depth)


def multikey(dice: Dice, needles: int, depth: float) -> Draft:
    """As many needles as asked for, each with a key of its own; the first is asked for."""
    return _multikey(dice, needles, depth)


def _multikey(dice: Dice, needles: int, depth: float) -> Draft:
    keys, codes = english.keys(dice, needles), english.codes(dice, needles)
    told = [f"The access code of the {k} is {c}." for k, c in zip(keys, codes, strict=True)]
    stem = f"access code of the {keys[0]}"
    question = Ask(f"Question: What is the {stem}?", f"The {stem} is", (codes[0],))
    return _english(dice, told, depth, question)


def multivalue(dice: Dice, needles: int, depth: float) -> Draft:
    """Several needles of one key; all values are asked for."""
    (key,), codes = english.keys(dice, 1), english.codes(dice, needles)
    told = [f"One access code of the {key} is {code}." for code in codes]
    question = Ask(
        f"Question: What are all {needles} access codes of the {key}?",
        f"The {needles} access codes of the {key} are:",
        tuple(codes),
    )
    return _english(dice, told, depth, question)


def _english(dice: Dice, told: Sequence[str], depth: float, question: Ask) -> Draft:
    depths = _depths(dice, len(told), depth)
    filler = english.Filler(dice)
    return Draft(
        pieces=lambda units: place(filler(units), told, depths),
        asks=(question,),
        intro=_INTRO,
        depth=depth,
    )


def tiny_single(dice: Dice, needles: int, depth: float) -> Draft:
    """One note."""
    return _tiny_multikey(dice, 1, depth)


def tiny_multikey(dice: Dice, needles: int, depth: float) -> Draft:
    """Notes of one kind about several names; the first is asked for."""
    return _tiny_multikey(dice, needles, depth)


def _tiny_multikey(dice: Dice, needles: int, depth: float) -> Draft:
    what = dice.pick(("pet", "box"))
    facts = zip(
        dice.sample(tinytext.NAMES, needles),
        dice.sample(tinytext.VALUES[what], needles),
        strict=True,
    )
    told = [(what, name, value) for name, value in facts]
    return _tiny(dice, told, depth, asked=1)


def tiny_multivalue(dice: Dice, needles: int, depth: float) -> Draft:
    """One name with a pet and a box, asked one after the other: the models answer with one word."""
    name = dice.pick(tinytext.NAMES)
    told = [(what, name, dice.pick(tinytext.VALUES[what])) for what in ("pet", "box")]
    return _tiny(dice, told, depth, asked=2)


def _tiny(dice: Dice, told: Sequence[tuple[str, str, str]], depth: float, *, asked: int) -> Draft:
    notes = [tinytext.note(*fact) for fact in told]
    depths = _depths(dice, len(notes), depth)
    filler = tinytext.Filler(dice)
    return Draft(
        pieces=lambda units: place(filler(units), notes, depths),
        asks=tuple(tinytext.ask(*fact) for fact in told[:asked]),
        around=tinytext.AROUND,
        glue=tinytext.GLUE,
        depth=depth,
    )


def _depths(dice: Dice, count: int, first: float) -> list[float]:
    """The first where it is wanted, the others anywhere."""
    return [first, *(dice.share() for _ in range(count - 1))]
