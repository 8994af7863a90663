"""Divergences as summands of a loss: their parameters, and what of the teacher each can be had from.

whole distribution ──► dense ┐
top-k and its rest ──► top   ├──► between: the formula in `divergences`
draws              ──► drawn ┘    (forward KL only, as a cross entropy)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field

from compresskit.distill.batch import Draws, TopK
from compresskit.distill.losses import divergences, sparse
from compresskit.distill.losses.term import OPTION, Kind, Term
from compresskit.errors import SpecError

if TYPE_CHECKING:
    import torch

Tail = Literal["bucket", "none", "renormalised"]


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
