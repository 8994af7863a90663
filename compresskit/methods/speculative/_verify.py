"""Decide how much of a draft the model itself would have said.

Speculative sampling: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
With p the model's distribution and q the one that the draft was drawn from,

    accept draft token x        with probability   min(1, p(x) / q(x))
    otherwise emit instead      a sample of        max(p - q, 0), normalised

and the token that comes out is distributed as p, whatever q is. The drafts of a lookup are
certain, q(x) = 1: accept with p(x), otherwise sample from p without x. At temperature 0 all of it
becomes "accept while the draft is the arg max".

A certain tree needs less: say a token after every node, independently, and walk down from the root
while what was said is a child. What is emitted at each node is what the model said there, so its
distribution is the model's whatever the tree holds (trees of drafts: Miao et al. 2023, SpecInfer,
arXiv 2305.09781).

`typical` is not lossless and says so: a draft token stays if the model finds it likely enough for
its own uncertainty, p(x) > min(threshold, alpha · exp(-entropy of p)) (Cai et al. 2024, Medusa,
arXiv 2401.10774).
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from compresskit.methods.speculative._draft import ROOT, Draft
from compresskit.sampling import probabilities

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compresskit.spec import SamplingSpec


class Verdict(NamedTuple):
    """Tokens to emit: those of the draft at `path`, and one more from the model."""

    tokens: list[int]
    path: list[int]

    @property
    def accepted(self) -> int:
        """How many tokens of the draft are emitted."""
        return len(self.path)


class Judge(Protocol):
    """A rule of acceptance: `verify`, or one that is not lossless."""

    def __call__(
        self,
        logits: torch.Tensor,
        drafts: Sequence[Draft],
        sampling: SamplingSpec,
        generator: torch.Generator | None,
    ) -> list[Verdict]:
        """Judge the draft of every row, as `verify`."""


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
    """Return how many tokens of a chain are accepted, and the distribution `[V]` of the next one.

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


def walk(said: Sequence[int], draft: Draft) -> Verdict:
    """Follow the draft from its root while it holds what the model `said` after each node.

    said: `k + 1` tokens, after the newest token and after each token of the draft.
    """
    children = {
        (parent, token): place
        for place, (parent, token) in enumerate(zip(draft.follows(), draft.tokens, strict=True))
    }
    path: list[int] = []
    at = ROOT
    while (place := children.get((at, said[at + 1]))) is not None:
        path.append(place)
        at = place
    return Verdict([*(draft.tokens[place] for place in path), said[at + 1]], path)


def likely(p: torch.Tensor, threshold: float, alpha: float) -> torch.Tensor:
    """Whether each token is typical enough: bool `[..., V]` of probabilities `[..., V]`."""
    entropy = -torch.xlogy(p, p).sum(-1, keepdim=True)
    return p > (alpha * torch.exp(-entropy)).clamp(max=threshold)


def verify(
    logits: torch.Tensor,
    drafts: Sequence[Draft],
    sampling: SamplingSpec,
    generator: torch.Generator | None,
) -> list[Verdict]:
    """Judge the draft of every row by the logits `[B, T, V]` after each token of its block.

    A block is the newest token and the draft; rows with shorter blocks are padded at the end.
    The emitted tokens are exactly the model's: equal ones at temperature 0, equally distributed ones
    otherwise.
    """
    if sampling.temperature == 0:
        heard: list[list[int]] = logits.argmax(-1).tolist()
        return [walk(said, draft) for said, draft in zip(heard, drafts, strict=True)]
    p = probabilities(logits, sampling)
    if any(draft.parents is not None for draft in drafts):
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
        heard = drawn.tolist()
        return [walk(said, draft) for said, draft in zip(heard, drafts, strict=True)]
    uniform = torch.rand(p.shape[:2], device=p.device, generator=generator)
    judged = [
        judge(p[row, : len(draft.tokens) + 1], draft, uniform[row, : len(draft.tokens)])
        for row, draft in enumerate(drafts)
    ]
    after = torch.stack([distribution for _, distribution in judged])
    last: list[int] = torch.multinomial(after, 1, generator=generator)[:, 0].tolist()
    return [
        Verdict([*draft.tokens[:accepted], token], list(range(accepted)))
        for (accepted, _), draft, token in zip(judged, drafts, last, strict=True)
    ]


def typical(
    logits: torch.Tensor,
    drafts: Sequence[Draft],
    sampling: SamplingSpec,
    generator: torch.Generator | None,
    *,
    threshold: float,
    alpha: float,
) -> list[Verdict]:
    """Follow typical tokens as deep as they go; the last token is the model's own.

    At temperature 0 what is typical is judged at temperature 1, and the last token is the arg max.
    """
    greedy = sampling.temperature == 0
    p = logits.float().softmax(-1) if greedy else probabilities(logits, sampling)
    fine = likely(p, threshold, alpha)
    verdicts = []
    for row, draft in enumerate(drafts):
        places = torch.tensor([parent + 1 for parent in draft.follows()], dtype=torch.long)
        tokens = torch.tensor(draft.tokens, dtype=torch.long)
        good = fine[row][places.to(p.device), tokens.to(p.device)].tolist() if draft.tokens else []
        path = _deepest(draft, good)
        after = p[row, path[-1] + 1 if path else 0]
        last = int(
            after.argmax() if greedy else torch.multinomial(after, 1, generator=generator)[0]
        )
        verdicts.append(Verdict([*(draft.tokens[place] for place in path), last], path))
    return verdicts


def _deepest(draft: Draft, good: Sequence[bool]) -> list[int]:
    """Places of the longest run of good tokens from the root; the first of equals."""
    paths: dict[int, list[int]] = {ROOT: []}
    for place, parent in enumerate(draft.follows()):
        if good[place] and parent in paths:
            paths[place] = [*paths[parent], place]
    return max(paths.values(), key=len)


def _leading(hits: Iterable[bool]) -> int:
    return sum(takewhile(bool, hits))
