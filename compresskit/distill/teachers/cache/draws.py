"""Tokens drawn from the teacher, weighted so that sums over them are right on average.

Of `n` draws from a proposal `q`, each token `x` gets the weight `p(x) / (n q(x))`, so that

    E[ sum_k w_k f(x_k) ]  =  sum_x q(x) p(x)/q(x) f(x)  =  sum_x p(x) f(x)      for every f

The cross-entropy of a student and its gradient are such sums, whoever the student is. One place is a
rough picture of its distribution; a batch of them is not, and errors are independent of each other.
With `q = p` the weights are counts over n, stored as one byte each and exact.

Paper: Anshumann et al. 2025, Sparse Logit Sampling, arXiv 2503.16870 (random sampling KD).
Differs: `n` counts draws; a token that is drawn again is stored once, with a larger count.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, final

import torch
from pydantic import Field

from compresskit.distill.batch import Draws
from compresskit.distill.teachers.cache.formats import (
    Column,
    Format,
    Stored,
    entropy,
    id_type,
    mean_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
class DrawsFormat(Format):
    """Ids of drawn tokens, with how often they came."""

    kind: ClassVar[Literal["draws"]] = "draws"
    about: ClassVar[str] = (
        "entropy is drawn beside exact: equal but for noise, which rms_error_nats is of one place; "
        "smoothed_kl_nats takes a place alone (its draws and one more, spread over the vocabulary), "
        "a picture that training never uses, so it does not rank this format below topk"
    )

    n: Annotated[int, Field(ge=1, le=255)] = 12
    """Draws of each place."""
    power: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Tokens are proposed in proportion to the teacher's probability to this power; below 1 rare ones
    come more often, with smaller weights, which are then stored in four bytes each."""

    def columns(self, vocabulary: int) -> Mapping[str, Column]:
        """ids, and counts or weights."""
        counted = {"counts": Column(torch.uint8, self.n)}
        weighted = {"weights": Column(torch.float32, self.n)}
        return {
            "ids": Column(id_type(vocabulary), self.n),
            **(counted if self.power == 1 else weighted),
        }

    def uniforms(self) -> int:
        """One a draw."""
        return self.n

    def pack(self, logprobs: torch.Tensor, uniforms: torch.Tensor) -> Stored:
        """Draw by inverting the distribution function, then put equal tokens together."""
        proposal = logprobs.exp() if self.power == 1 else logprobs.mul(self.power).softmax(-1)
        # float64: in float32 the steps of rare tokens would vanish beside a sum near one.
        below = proposal.cumsum(-1, dtype=torch.float64)
        drawn = torch.searchsorted(below, uniforms * below[:, -1:], right=True)
        ids, counts = _merged(drawn.clamp_(max=logprobs.shape[-1] - 1))
        columns = self.columns(logprobs.shape[-1])
        stored = {"ids": ids.to(columns["ids"].dtype)}
        if self.power == 1:
            return {**stored, "counts": counts.to(torch.uint8)}
        ratio = logprobs.gather(-1, ids).double().exp() / proposal.gather(-1, ids).double()
        return {**stored, "weights": (counts * ratio / self.n).float().masked_fill(counts == 0, 0)}

    def unpack(self, stored: Mapping[str, torch.Tensor]) -> Draws:
        """Counts become weights."""
        weights = stored["counts"].float() / self.n if self.power == 1 else stored["weights"]
        return Draws(stored["ids"].long(), weights)

    def errors(self, logprobs: torch.Tensor, stored: Stored) -> dict[str, torch.Tensor]:
        """Estimates of the entropy, and the kl of a smoothed place.

        The entropy is the teacher's cross-entropy with itself: the sum of the kind that training
        takes, for the one model that is at hand.
        """
        back = self.unpack(stored)
        exact, own = entropy(logprobs), logprobs.gather(-1, back.ids).double()
        weights = back.weights.double()
        drawn = mean_of(weights, -own)
        # Smoothed: one draw more, spread evenly. Unused entries have weight 0 and name token 0, which
        # must not be taken for drawn.
        even = 1 / (logprobs.shape[-1] * (self.n + 1))
        given = weights / weights.sum(-1, keepdim=True) * self.n / (self.n + 1) + even
        probs = own.exp().masked_fill(weights == 0, 0.0)
        smooth = mean_of(probs, given.log()) + (1 - probs.sum(-1)) * math.log(even)
        return {
            "exact": exact,
            "drawn": drawn,
            "squared": (drawn - exact).square(),
            "smoothed_kl": -exact - smooth,
        }

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Means as they are, and the root of the squared error."""
        return {
            "entropy_nats": means["exact"],
            "entropy_drawn_nats": means["drawn"],
            "rms_error_nats": means["squared"] ** 0.5,
            "smoothed_kl_nats": means["smoothed_kl"],
        }


def _merged(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Different tokens of int64 `[n, N]` with how often they stand there; unused entries 0 and 0."""
    ordered = drawn.sort(-1).values
    new = torch.ones_like(ordered)
    new[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    place = new.cumsum(-1) - 1
    ids = torch.zeros_like(ordered).scatter(-1, place, ordered)
    return ids, torch.zeros_like(ordered).scatter_add(-1, place, torch.ones_like(ordered))
