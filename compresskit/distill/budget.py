"""How long to train: a number of steps, tokens, minutes or joules, and what of it is spent.

The learning rate follows the share of the budget that is spent (`schedule`), so that a training
ends with its last small steps whatever bounds it. Steps and tokens are counted and repeat exactly;
minutes and joules depend on the machine, and so does everything that follows from them.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self

from pydantic import Field

from compresskit.errors import SpecError
from compresskit.spec import Frozen

Kind = Literal["steps", "tokens", "seconds", "joules"]

_UNITS: dict[str, tuple[Kind, float]] = {
    "step": ("steps", 1),
    "token": ("tokens", 1),
    "s": ("seconds", 1),
    "sec": ("seconds", 1),
    "second": ("seconds", 1),
    "min": ("seconds", 60),
    "minute": ("seconds", 60),
    "h": ("seconds", 3600),
    "hour": ("seconds", 3600),
    "j": ("joules", 1),
    "joule": ("joules", 1),
    "kj": ("joules", 1e3),
    "kilojoule": ("joules", 1e3),
    "wh": ("joules", 3600),
}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_FORM = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([kKMGB]?)\s*([A-Za-z]+)\s*")


class Amount(Frozen):
    """So much of something that a training uses up."""

    kind: Kind
    amount: Annotated[float, Field(gt=0)]
    """Steps, tokens, seconds or joules."""

    @classmethod
    def parse(cls, text: str, *, option: str) -> Self:
        """Read `2M tokens`, `500 steps`, `45 minutes` or `20000 joules`.

        Raises:
            SpecError: it is none of these, or not above zero.
        """
        found = _FORM.fullmatch(text)
        unit = None if found is None else _unit(found[3])
        if found is None or unit is None:
            raise SpecError(
                f"{option} {text!r}: write a number and what it counts, such as '2M tokens', "
                "'500 steps', '45 minutes' or '20 kJ'."
            )
        kind, scale = unit
        if found[2] and kind == "seconds":
            raise SpecError(
                f"{option} {text!r}: write time without a prefix, such as '45 minutes'."
            )
        number = float(found[1].replace("_", "").replace(",", ""))
        value = number * _PREFIXES[found[2].lower()] * scale
        if not 0 < value < math.inf:
            raise SpecError(f"{option} {text!r}: it has to be more than nothing, and to end.")
        return cls(kind=kind, amount=value)

    def spent(self, *, steps: int, tokens: int, seconds: float, joules: float | None) -> float:
        """Share of the amount that is used up, from 0; above 1 once it is overdrawn.

        Raises:
            SpecError: joules are counted and there is no reading of them.
        """
        if self.kind == "steps":
            return steps / self.amount
        if self.kind == "tokens":
            return tokens / self.amount
        if self.kind == "seconds":
            return seconds / self.amount
        if joules is None:
            raise SpecError(
                "the budget is in joules and there is no reading of energy. Give it in tokens, "
                "steps or minutes."
            )
        return joules / self.amount


def _unit(word: str) -> tuple[Kind, float] | None:
    lower = word.lower()
    return _UNITS.get(lower) or _UNITS.get(lower.removesuffix("s"))
