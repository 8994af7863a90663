"""The terms of a loss, as typed behind `--loss`: names, parameters, and which teacher each one needs.

    forward_kl                            ce:weight=0.5 + jsd:beta=0.1,weight=0.5
    forward_kl:temperature=2              forward_kl + hidden:at=every,weight=0.1

                      whole distribution   top-k                     draws
    ce                yes                  yes                       yes      (asks no teacher)
    forward_kl        yes                  at temperature 1, or      at temperature 1, up to the
                                           tail=renormalised         teacher's entropy
    tvd               yes                  yes                       no
    other divergences yes                  at temperature 1          no
    hidden            yes                  no                        no

A temperature divides the logits of both sides and multiplies the divergence by its square, so that
the gradient keeps its size (Hinton et al. 2015, arXiv 1503.02531). TRL and Liger divide, and do not
multiply.

To add a divergence: one function in `divergences`, one final class here, its name in `TERMS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, final

from pydantic import Field

from compresskit.distill.batch import Dense, Draws, TopK
from compresskit.distill.losses import divergences, sparse
from compresskit.errors import SpecError, UnknownName
from compresskit.spec import Frozen, parse_sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from compresskit.distill.batch import Target

OPTION = "--loss"
Kind = Literal["dense", "topk", "draws"]
"""Which form of `Target` there is: `Dense`, `TopK` or `Draws`."""
Tail = Literal["bucket", "none", "renormalised"]


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


class Divergence(Term):
    """A divergence of what the teacher and the student expect next."""

    @abstractmethod
    def between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Nats `[n]` of log-probabilities of the same outcomes."""

    def of(self, student: torch.Tensor, target: torch.Tensor | TopK | Draws) -> torch.Tensor:
        """Nats `[n]` of the student's log-probabilities `[n, V]`.

        target: the teacher's log-probabilities `[n, V]`, or what is known of them.
        """
        if isinstance(target, TopK):
            return self.top(student, target)
        if isinstance(target, Draws):
            return self.drawn(student, target)
        return self.dense(student, target)

    def dense(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The divergence of the whole distributions."""
        return self.between(student, teacher)

    def top(self, student: torch.Tensor, target: TopK) -> torch.Tensor:
        """The divergence of `K + 1` buckets, a lower bound of the whole one."""
        return self.between(*sparse.bucketed(student, target))

    def drawn(self, student: torch.Tensor, target: Draws) -> torch.Tensor:
        """Not to be had.

        Raises:
            SpecError: always; `check` says so before a training begins.
        """
        raise SpecError(f"{OPTION} {self.name}: {self.missing('draws')}.")

    def missing(self, kind: Kind | None) -> str | None:
        """Draws tell too little."""
        if kind == "draws":
            return (
                "needs the teacher's probability of tokens that were not drawn. Use forward_kl or ce, "
                "cache topk instead, or ask the teacher itself"
            )
        return super().missing(kind)


class Cooled(Divergence):
    """A divergence with a temperature."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of both sides; the divergence is multiplied by its square."""

    def dense(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The divergence of the whole distributions at this temperature, times its square."""
        pair = (divergences.cooled(side, self.temperature) for side in (student, teacher))
        return self.temperature**2 * self.between(*pair)

    def missing(self, kind: Kind | None) -> str | None:
        """A tail has one temperature only."""
        if kind == "topk" and self.temperature != 1:
            return (
                "a cached top-k has no other temperature: what its tail would weigh is not known. Use "
                "temperature=1, forward_kl:tail=renormalised, or ask the teacher itself"
            )
        return super().missing(kind)


@final
class ForwardKL(Cooled):
    """KL(teacher || student)."""

    name = "forward_kl"
    tail: Tail = "bucket"
    """Only with a cached top-k. bucket: all other tokens count as one. none: they are left out,
    which is no divergence any more (it can fall below 0, and exceed the whole one). renormalised:
    teacher and student are compared as if there were no others."""

    def between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """As `divergences.forward_kl`."""
        return divergences.forward_kl(student, teacher)

    def top(self, student: torch.Tensor, target: TopK) -> torch.Tensor:
        """The divergence with the tail treated as asked for."""
        if self.tail == "renormalised":
            pair = sparse.renormalised(student, target, self.temperature)
            return self.temperature**2 * self.between(*pair)
        if self.tail == "none":
            return self.between(*sparse.kept(student, target))
        return super().top(student, target)

    def drawn(self, student: torch.Tensor, target: Draws) -> torch.Tensor:
        """An unbiased estimate of the divergence and the teacher's entropy."""
        return sparse.cross_entropy(student, target)

    def missing(self, kind: Kind | None) -> str | None:
        """A tail other than the bucket asks for a top-k; draws are made at temperature 1."""
        if self.tail != "bucket" and kind in ("dense", "draws"):
            return f"tail={self.tail} is for a cached top-k. Leave tail out"
        if kind == "draws":
            if self.temperature == 1:
                return None
            return "draws are made at temperature 1. Use temperature=1, or ask the teacher itself"
        if kind == "topk" and self.tail == "renormalised":
            return None
        return super().missing(kind)


@final
class ReverseKL(Cooled):
    """KL(student || teacher)."""

    name = "reverse_kl"

    def between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """As `divergences.reverse_kl`."""
        return divergences.reverse_kl(student, teacher)


@final
class JSD(Cooled):
    """Jensen-Shannon divergence, weighted."""

    name = "jsd"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The teacher's part of the mixture, as in TRL and Liger; for their ends 0 and 1, which are no
    limits of it, write forward_kl and reverse_kl."""

    def between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """As `divergences.jsd`."""
        return divergences.jsd(student, teacher, self.beta)


@final
class SkewKL(Cooled):
    """KL(teacher || mixture of both)."""

    name = "skew_kl"
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The teacher's part of the mixture."""

    def between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """As `divergences.skew_kl`."""
        return divergences.skew_kl(student, teacher, self.alpha)


@final
class SkewReverseKL(Cooled):
    """KL(student || mixture of both)."""

    name = "skew_reverse_kl"
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The student's part of the mixture."""

    def between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """As `divergences.skew_reverse_kl`."""
        return divergences.skew_reverse_kl(student, teacher, self.alpha)


@final
class TVD(Divergence):
    """Total variation distance; no temperature, whose square would not keep its gradient's size."""

    name = "tvd"

    def between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """As `divergences.tvd`."""
        return divergences.tvd(student, teacher)


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


TERMS: Mapping[str, type[Term]] = MappingProxyType(
    {
        term.name: term
        for term in (
            CrossEntropy,
            ForwardKL,
            ReverseKL,
            JSD,
            SkewKL,
            SkewReverseKL,
            TVD,
            Hidden,
        )
    }
)


def parse(text: str) -> tuple[Term, ...]:
    """Read a sum of terms.

    Raises:
        SpecError: nothing is asked for, a parameter is wrong, or a term stands there twice.
        UnknownName: there is no such term.
    """
    found: dict[str, Term] = {}
    for name, params in parse_sum(text, option=OPTION):
        if name not in TERMS:
            raise UnknownName(f"term of {OPTION}", name, TERMS)
        if name in found:
            raise SpecError(f"{OPTION} {text!r}: {name} stands there twice. Give it one weight.")
        found[name] = TERMS[name].decode(params, where=f"{OPTION} {name}")
    if not found:
        raise SpecError(f"{OPTION} {text!r}: names no term. Known: {', '.join(TERMS)}.")
    return tuple(found.values())


def text_of(terms: Iterable[Term]) -> str:
    """What `parse` reads as the same terms, every parameter spelled out."""
    return " + ".join(term.text() for term in terms)


def kind_of(target: Target | None) -> Kind | None:
    """The form of a target; None where there is no teacher."""
    if isinstance(target, Dense):
        return "dense"
    if isinstance(target, TopK):
        return "topk"
    return None if target is None else "draws"


def check(terms: Iterable[Term], kind: Kind | None) -> None:
    """Make sure that every term can be had from such a target, before anything is trained.

    Raises:
        SpecError: one cannot; says which, why, and what can be done.
    """
    for term in terms:
        if reason := term.missing(kind):
            raise SpecError(f"{OPTION} {term.name}: {reason}.")
