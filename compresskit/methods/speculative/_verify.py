"""Decide how much of a draft the model itself would have said.

Speculative sampling: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
With p the model's distribution and q the one that the draft was drawn from,

    accept draft token x        with probability   min(1, p(x) / q(x))
    otherwise emit instead      a sample of        max(p - q, 0), normalised

and the token that comes out is distributed as p, whatever q is. The drafts of a lookup are
certain, q(x) = 1: accept with p(x), otherwise sample from p without x. At temperature 0 all of it
becomes "accept while the draft is the arg max".
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.sampling import probabilities

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compresskit.spec import SamplingSpec


class Draft(NamedTuple):
    """Guessed tokens, and the distributions they were drawn from.

    q: float `[k, V]` after all filters of the sampling; None when the guess was certain (one-hot).
    """

    tokens: list[int]
    q: torch.Tensor | None = None


class Verdict(NamedTuple):
    """Tokens to emit: the first `accepted` come from the draft, one more from the model."""

    tokens: list[int]
    accepted: int


def accept_probability(
    p: torch.Tensor, q: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """Probability `[k]` of accepting `tokens` `[k]` under `p` and `q`, each `[k, V]`."""
    chosen = tokens.unsqueeze(-1)
    target = p.gather(-1, chosen).squeeze(-1)
    if q is None:
        return target
    return (target / q.gather(-1, chosen).squeeze(-1)).clamp(max=1.0)


def residual(p: torch.Tensor, q: torch.Tensor | None, token: int) -> torch.Tensor:
    """Distribution `[V]` of what is emitted instead of the rejected `token`."""
    left = (
        (p - q).clamp(min=0.0)
        if q is not None
        else p.index_fill(-1, torch.tensor([token], device=p.device), 0.0)
    )
    return left / left.sum()


def judge(p: torch.Tensor, draft: Draft, uniform: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return how many draft tokens are accepted, and the distribution `[V]` of the next one.

    p: `[k + 1, V]`, the distribution after each prefix of the draft; uniform: `[k]` in [0, 1).
    """
    if not draft.tokens:
        return 0, p[0]
    tokens = torch.tensor(draft.tokens, device=p.device)
    # Strictly below: a uniform of exactly 0 must not accept a token of probability 0.
    accepted = _leading((uniform < accept_probability(p[:-1], draft.q, tokens)).tolist())
    if accepted == len(draft.tokens):
        return accepted, p[-1]
    q = None if draft.q is None else draft.q[accepted]
    return accepted, residual(p[accepted], q, draft.tokens[accepted])


def verify(
    logits: torch.Tensor, draft: Draft, sampling: SamplingSpec, generator: torch.Generator | None
) -> Verdict:
    """Judge a draft of k tokens by the logits `[k + 1, V]` that follow each of its prefixes."""
    if sampling.temperature == 0:
        said: list[int] = logits.argmax(-1).tolist()
        accepted = _leading(map(int.__eq__, draft.tokens, said))
        return Verdict(said[: accepted + 1], accepted)
    uniform = torch.rand(len(draft.tokens), device=logits.device, generator=generator)
    accepted, after = judge(probabilities(logits, sampling), draft, uniform)
    last = int(torch.multinomial(after, 1, generator=generator))
    return Verdict([*draft.tokens[:accepted], last], accepted)


def _leading(hits: Iterable[bool]) -> int:
    return sum(takewhile(bool, hits))
