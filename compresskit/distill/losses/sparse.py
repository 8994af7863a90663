"""What can be said of a divergence where the teacher is known in part.

Top-k: the `K` likeliest tokens are kept apart, all others fall into one bucket.

    teacher  p1 p2 ... pK | rest          both are distributions of K + 1 outcomes, and any divergence
    student  q1 q2 ... qK | 1 - sum       of them is at most that of the whole distributions

Leaving the bucket out is no harmless simplification. Without it the student is never told how much
probability belongs to other tokens; renormalised, it is told that none does.

Draws: tokens drawn from the teacher give unbiased sums over its distribution, hence its cross-entropy
with the student, which is the forward KL and the teacher's entropy, a constant that no student
changes: the gradient is that of the forward KL on average. Whatever needs the teacher's probability
of tokens that were not drawn cannot be had.

Paper: Anshumann et al. 2025, Sparse Logit Sampling, arXiv 2503.16870 (top-k targets are biased,
sampled ones are not).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from compresskit.distill.batch import Draws, TopK


class Pair(NamedTuple):
    """Log-probabilities of the same outcomes."""

    student: torch.Tensor
    """`[n, K]` or `[n, K + 1]`."""
    teacher: torch.Tensor


def bucketed(student: torch.Tensor, top: TopK) -> Pair:
    """The teacher's tokens and a bucket of all others, of the student's `[n, V]` log-probabilities.

    Where the tokens are the whole vocabulary there is no bucket: nothing would be in it.
    """
    pair = kept(student, top)
    if top.ids.shape[1] == student.shape[1]:
        return pair
    # Not log(1 - sum): where the student is nearly sure that would be a difference of equal numbers.
    rest = student.scatter(1, top.ids, -torch.inf).logsumexp(1, keepdim=True)
    return Pair(
        torch.cat((pair.student, rest), 1),
        torch.cat((pair.teacher, top.rest[:, None].to(student.dtype)), 1),
    )


def kept(student: torch.Tensor, top: TopK) -> Pair:
    """The teacher's tokens alone: two lists that sum to less than 1."""
    return Pair(student.gather(1, top.ids), top.logprobs.to(student.dtype))


def renormalised(student: torch.Tensor, top: TopK, temperature: float) -> Pair:
    """The teacher's tokens as if there were no others, at any temperature."""
    pair = kept(student, top)
    return Pair(*((side / temperature).log_softmax(-1) for side in pair))


def cross_entropy(student: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Nats `[n]`: an unbiased estimate of the cross-entropy of teacher and student."""
    drawn = student.gather(1, draws.ids)
    # An unused entry may name any token, also one that the student rules out: 0 times -inf.
    drawn = drawn.masked_fill(draws.weights == 0, 0.0)
    return -(draws.weights.to(student.dtype) * drawn).sum(-1)
