"""Divergences between what a student and its teacher expect next.

Every function takes log-probabilities `[n, V]`, the student's `q` first, the teacher's `p` second, and
returns nats `[n]` in their type. None averages: how places are weighed is the caller's business. An
outcome that both give no probability adds nothing; KL is infinite where its first distribution
expects what the second rules out.

    forward_kl      KL(p || q)                                 covers all that the teacher would say
    reverse_kl      KL(q || p)                                 says only what the teacher would
    jsd             b KL(p || m) + (1-b) KL(q || m),  m = b p + (1-b) q
    skew_kl         KL(p || a p + (1-a) q)
    skew_reverse_kl KL(q || a q + (1-a) p)
    tvd             half the sum of |p - q|

As b goes to 0, jsd / b goes to KL(p || q), and jsd itself to 0: it is no path from one KL to the
other, so its ends are left out here. TRL and Liger put the two KLs there.

Papers: Lin 1991, Divergence measures based on the Shannon entropy (jsd); Agarwal et al. 2023,
arXiv 2306.13649 (jsd with weights, for distillation); Ko et al. 2024, DistiLLM, arXiv 2402.03898
(skew); Hinton et al. 2015, arXiv 1503.02531 (temperature).
"""

from __future__ import annotations

import math

import torch


def cooled(logprobs: torch.Tensor, temperature: float) -> torch.Tensor:
    """The distribution `[n, V]` that the same logits give at another temperature."""
    return logprobs if temperature == 1 else (logprobs / temperature).log_softmax(-1)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student): what the teacher would be surprised by, on average."""
    return _kl(teacher, student)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher)."""
    return _kl(student, teacher)


def jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Jensen-Shannon divergence; `beta` is the teacher's part of the mixture, above 0 and below 1."""
    middle = _mixture(teacher, student, beta)
    return beta * _kl(teacher, middle) + (1 - beta) * _kl(student, middle)


def skew_kl(student: torch.Tensor, teacher: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(teacher || mixture) with `alpha` of the teacher in the mixture: never above -log(alpha)."""
    return _kl(teacher, _mixture(teacher, student, alpha))


def skew_reverse_kl(student: torch.Tensor, teacher: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(student || mixture) with `alpha` of the student in the mixture: never above -log(alpha)."""
    return _kl(student, _mixture(student, teacher, alpha))


def tvd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Total variation distance, 0 to 1: the chance that speculative sampling rejects a draft."""
    return (student.exp() - teacher.exp()).abs().sum(-1) / 2


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum of p (log p - log q) over outcomes that p does not rule out."""
    # -inf - -inf is no number, and 0 times that is none either: such outcomes are masked before.
    return (p.exp() * (p - q).masked_fill_(p == -torch.inf, 0.0)).sum(-1)


def _mixture(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """Log of `share * first + (1 - share) * second`."""
    if share == 0:
        return second
    both = torch.maximum(first, second) == -torch.inf
    first = (first + math.log(share)).masked_fill_(both, 0.0)
    second = (second + math.log1p(-share)).masked_fill_(both, 0.0)
    return torch.logaddexp(first, second).masked_fill(both, -torch.inf)
