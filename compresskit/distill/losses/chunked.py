"""The loss of all places and its gradient, without all logits at a time.

Logits of `N` places are `N * V` numbers, and a loss written plainly keeps several such matrices until
its backward pass: at 49152 tokens and 2048 places each one is 403 MB. Here they come and go in chunks:

    hidden [N, E] ──► chunk [n, E] ─► logits [n, V] ─► terms ─► their gradient [n, V]
                                                                  │
              gradient of hidden [n, E], and of the head [V, E] ◄─┘   added up chunk by chunk

The gradient is formed in the forward pass, while the chunk's logits are there; the backward pass
multiplies it by a number. Nothing is approximated: the sums are those of the plain loss in another
order. The idea is that of Liger's fused linear losses (Hsu et al. 2024, arXiv 2410.10989).

The price is that every forward pass that needs a gradient also forms it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from compresskit.distill.batch import Dense
from compresskit.distill.losses.divergence_terms import Divergence
from compresskit.distill.losses.layer import Gradients, layer_of, wide
from compresskit.errors import Conflict, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from compresskit.distill.batch import Target
    from compresskit.distill.losses.term import CrossEntropy

CHUNK_BYTES = 1 << 25
"""Of one matrix of float32 logits of a chunk. Four (ce) to eleven (jsd) such matrices are alive at a time."""


class Sums(NamedTuple):
    """Sums over places, each times its weight."""

    total: torch.Tensor
    """Of all terms times their weights; a number with a gradient."""
    parts: torch.Tensor
    """`[terms]`: of each term by itself, without its weight and without a gradient."""


@dataclass(frozen=True)
class Places:
    """What is asked of `N` places."""

    labels: torch.Tensor
    """int64 `[N]`."""
    weights: torch.Tensor
    """float32 `[N]`."""
    target: Target | None

    def at(self, where: slice | torch.Tensor) -> Places:
        """Some of the places; what a slice returns are views."""
        return Places(self.labels[where], self.weights[where], at(self.target, where))


def at(target: Target | None, where: slice | torch.Tensor) -> Target | None:
    """What the teacher says of some places."""
    if target is None:
        return None
    if isinstance(target, Dense):
        states = {block: state[where] for block, state in target.states.items()}
        return Dense(target.hidden[where], target.head, states)
    return type(target)(*(tensor[where] for tensor in target))


def chunk_of(vocabulary: int) -> int:
    """Places whose logits take about `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def summed(
    hidden: torch.Tensor,
    head: nn.Module,
    terms: Sequence[CrossEntropy | Divergence],
    places: Places,
    *,
    chunk: int | None = None,
) -> Sums:
    """Sum `terms` over `places`, given the hidden states `[N, E]` under the student's logits.

    The sum's gradient reaches `hidden` and the parameters of `head`, and can be taken once.

    chunk: places at a time; chosen by the size of the vocabulary where left out.

    Raises:
        Conflict: student and teacher have vocabularies of different sizes.
        RunError: the gradient is taken twice.
    """
    job = _Job(head, tuple(terms), places, chunk)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    wanted = torch.is_grad_enabled() and bool(hidden.requires_grad or parameters)
    return Sums(*_Summed.apply(job, wanted, hidden, *parameters))  # type: ignore[no-untyped-call]


def values(
    logits: torch.Tensor,
    terms: Sequence[CrossEntropy | Divergence],
    places: Places,
    teacher: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Nats `[n]` of each term; `places` are those that the student's `logits` `[n, V]` belong to.

    teacher: what makes the teacher's logits of its hidden states; its head where left out.

    Raises:
        Conflict: student and teacher have vocabularies of different sizes.
    """
    student = _logprobs(logits)
    target: Any = places.target
    if isinstance(target, Dense) and any(isinstance(term, Divergence) for term in terms):
        with torch.no_grad():
            theirs = (teacher or target.head)(target.hidden)
            _same_vocabulary(logits, theirs)
            target = _logprobs(theirs)
            del theirs
    return [
        term.of(student, target)
        if isinstance(term, Divergence)
        else -student.gather(1, places.labels[:, None])[:, 0]
        for term in terms
    ]


def _logprobs(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least: bfloat16 has three digits, and a sum over a vocabulary needs more."""
    return logits.to(wide(logits)).log_softmax(-1)


def _same_vocabulary(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape != teacher.shape:
        raise Conflict(
            f"the student tells {student.shape[1]} tokens apart and its teacher {teacher.shape[1]}, so "
            "what they expect cannot be compared token by token. Use ce, or a student with the "
            "teacher's vocabulary."
        )


class _Summed(torch.autograd.Function):
    """Sums, with gradients that were formed on the way."""

    @staticmethod
    def forward(
        ctx: Any, job: _Job, wanted: bool, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the job; keep its gradients until they are asked for."""
        done = job.run(hidden, parameters, wanted=wanted)
        ctx.gradients = done.gradients
        ctx.mark_non_differentiable(done.sums.parts)
        return done.sums.total, done.sums.parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Hand the gradients out, times that of the sum."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RunError(
                "the gradient of a chunked loss is formed in its forward pass and handed out once. "
                "Run the forward pass again."
            )
        # In place: a second copy of the head's gradient would be as large as the head.
        return None, None, *(gradient.mul_(outer.to(gradient.dtype)) for gradient in gradients)


class _Done(NamedTuple):
    sums: Sums
    gradients: list[torch.Tensor] | None
    """Of the hidden states and of each parameter."""


@dataclass(frozen=True)
class _Job:
    """A loss to be computed."""

    head: nn.Module
    terms: tuple[CrossEntropy | Divergence, ...]
    places: Places
    chunk: int | None

    def run(
        self, hidden: torch.Tensor, parameters: Sequence[torch.Tensor], *, wanted: bool
    ) -> _Done:
        """Go through the places chunk by chunk; form gradients if `wanted`."""
        parts = torch.zeros(len(self.terms), dtype=wide(hidden), device=hidden.device)
        factors = parts.new_tensor([term.weight for term in self.terms])
        gradients = Gradients(hidden, parameters) if wanted else None
        if len(hidden):
            self._through(hidden, parts, factors, gradients)
        total = (factors * parts).sum()
        return _Done(Sums(total, parts), None if gradients is None else gradients.finished())

    def _through(
        self,
        hidden: torch.Tensor,
        parts: torch.Tensor,
        factors: torch.Tensor,
        gradients: Gradients | None,
    ) -> None:
        layer = layer_of(self.head, hidden)
        target = self.places.target
        teacher = None
        if isinstance(target, Dense):
            teacher = layer_of(target.head, target.hidden).logits
        step = self.chunk or chunk_of(layer.vocabulary(hidden))
        for start in range(0, len(hidden), step):
            here = slice(start, start + step)
            places = self.places.at(here)

            def loss(logits: torch.Tensor, places: Places = places) -> torch.Tensor:
                each = torch.stack(values(logits, self.terms, places, teacher))
                sums = (each * places.weights).sum(1)
                parts.add_(sums.detach())
                return (factors * sums).sum()

            if gradients is None:
                loss(layer.logits(hidden[here]))
            else:
                layer.slide(hidden[here], loss, here, gradients)
