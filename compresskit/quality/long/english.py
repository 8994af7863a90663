"""Plain English for real models: filler sentences, keys and numbers, all made up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compresskit.quality.long.dice import Dice

_WHO = (
    "The old librarian", "A young sailor", "The night watchman", "My neighbour", "The piano teacher",
    "A retired engineer", "The baker's daughter", "The tall gardener", "A visiting painter",
    "The bus driver", "Our postman", "The village doctor", "A careful tailor", "The school choir",
    "The ferry captain", "A group of students", "The quiet accountant", "The stable boy",
)  # fmt: skip
_DID = (
    "repaired a bicycle", "planted two apple trees", "counted the empty boxes", "waited for the rain",
    "read the newspaper aloud", "painted the fence", "looked for a lost umbrella", "cooked a pot of soup",
    "sold a few old books", "walked the dog", "cleaned the tall windows", "sharpened some pencils",
    "watched the clouds", "wrote a long letter", "carried water to the horses", "slept until noon",
    "played cards with friends", "argued about the weather",
)  # fmt: skip
_WHERE = (
    "near the harbour", "behind the station", "at the corner of the square", "in the small kitchen",
    "on the way to the market", "beside the canal", "under the stone bridge", "in front of the bakery",
    "at the edge of the forest", "in the empty theatre", "outside the town hall", "by the river",
)  # fmt: skip
_WHEN = (
    "on Monday", "before breakfast", "last summer", "in the afternoon", "after the concert", "at dawn",
    "during the holidays", "on a cold evening", "a week ago", "shortly after lunch",
)  # fmt: skip

_KINDS = (
    "copper", "wooden", "silver", "velvet", "marble", "paper", "leather", "crystal", "iron", "golden",
    "plastic", "woollen",
)  # fmt: skip
_OBJECTS = (
    "lantern", "suitcase", "compass", "violin", "ladder", "teapot", "mirror", "drawer", "cabinet",
    "telescope", "basket", "clock",
)  # fmt: skip
_LETTERS = "BCDFGHJKLMNPRSTVWXZ"


class Filler:
    """Sentences about nothing in particular; the first ones do not depend on how many are taken."""

    def __init__(self, dice: Dice) -> None:
        """Draw them from `dice` as they are asked for."""
        self._dice, self._drawn = dice, list[str]()

    def __call__(self, units: int) -> list[str]:
        """The first `units` sentences."""
        while len(self._drawn) < units:
            parts = (self._dice.pick(words) for words in (_WHO, _DID, _WHERE, _WHEN))
            self._drawn.append(" ".join(parts) + ".")
        return self._drawn[:units]


def keys(dice: Dice, count: int) -> list[str]:
    """Things that can have a code, all of them different objects: "copper lantern"."""
    return [f"{dice.pick(_KINDS)} {thing}" for thing in dice.sample(_OBJECTS, count)]


def codes(dice: Dice, count: int) -> list[str]:
    """Different numbers of five digits."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[str(dice.number(10000, 99999))] = None
    return list(found)


def variables(dice: Dice, count: int) -> list[str]:
    """Different names of three capitals."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(dice.pick(_LETTERS) for _ in range(3))] = None
    return list(found)
