"""What a summand of a loss is, and the two that are no divergence: the text itself, and hidden states."""

from __future__ import annotations

from abc import ABC
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from compresskit.spec import Frozen

OPTION = "--loss"
Kind = Literal["dense", "topk", "draws"]
"""Which form of `Target` there is: `Dense`, `TopK` or `Draws`."""


class Term(Frozen, ABC):
    """One summand of a loss."""

    name: ClassVar[str]
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of this term in the sum."""

    def missing(self, kind: Kind | None) -> str | None:
        """Why this term cannot be had from such a target, and the way out; None if it can.

        None for `kind` is no teacher at all.
        """
        if kind is None:
            return "needs a teacher. Use ce, or name a teacher"
        return None

    def text(self) -> str:
        """The term with all of its parameters, as `parse` reads it."""
        values = ",".join(f"{key}={value}" for key, value in self.model_dump(mode="json").items())
        return f"{self.name}:{values}"


@final
class CrossEntropy(Term):
    """Surprise at the token that really comes next; asks no teacher."""

    name = "ce"

    def missing(self, kind: Kind | None) -> str | None:
        """Nothing is: every text has next tokens."""
        return None


@final
class Hidden(Term):
    """Mean squared distance of hidden states, per number of a state.

    A student that is narrower than its teacher is compared through a trained projection.
    """

    name = "hidden"
    at: Literal["last", "every"] = "last"
    """last: the states under the logits. every: the states behind each block of the student and the
    teacher's block that it stands for, averaged over blocks."""

    def missing(self, kind: Kind | None) -> str | None:
        """Only a teacher that runs has hidden states."""
        if kind in ("topk", "draws"):
            return "a cache on disk holds no hidden states. Ask the teacher itself"
        return super().missing(kind)
