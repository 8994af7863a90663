"""The acceptance rule on paper: exact, in float64, without a random number.

    one token   sum over drafts d of  q(d) · [ A(d) · 1{x = d}  +  (1 - A(d)) · r_d(x) ]  =  p(x)
    chains      every draft and every place of the first rejection, reached by uniforms chosen for
                it, until the text is full: its probability must be the product of p
    trees       every combination of what the model says at the nodes

A is the chance of accepting a draft, r_d what is emitted instead (Leviathan et al. 2022, arXiv
2211.17192, appendix A.1). The functions are arguments, so that a wrong one can be tried.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.audit.document import RuleCheck
from compresskit.methods.speculative import _verify
from compresskit.methods.speculative._draft import ROOT, Draft

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Accept = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
    Residual = Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]
    Judged = Callable[[torch.Tensor, Draft, torch.Tensor], tuple[int, torch.Tensor]]
    Walk = Callable[[Sequence[int], Draft], _verify.Verdict]

BOUND = 1e-12
WORDS, LENGTH, AHEAD = 3, 3, 2
"""Vocabulary, length and longest draft of the enumerated texts."""
LAWS = 2
"""Random laws that texts are enumerated under."""

Text = tuple[int, ...]
Law = dict[Text, torch.Tensor]


class Pair(NamedTuple):
    """p, q as handed over (None: certain), and the distribution that drafts are really drawn from."""

    p: torch.Tensor
    q: torch.Tensor | None
    drawn: torch.Tensor


def emitted(pair: Pair, accept: Accept, residual: Residual) -> torch.Tensor:
    """Distribution `[V]` of the token that comes out."""
    p, q, drawn = pair
    out = torch.zeros_like(p)
    for token, chance in enumerate(drawn.tolist()):
        if chance == 0:
            continue
        rows = None if q is None else q.unsqueeze(0)
        accepted = float(accept(p.unsqueeze(0), rows, torch.tensor([token])))
        out[token] += chance * accepted
        if accepted < 1:
            out += chance * (1 - accepted) * residual(p, q, token)
    return out


def pairs() -> Iterator[Pair]:
    """Random, one-hot, zero-containing, nearly equal and truncated p and q."""
    generator = torch.Generator().manual_seed(0)

    def random(size: int = 8) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.double).pow(3)

    def norm(weights: torch.Tensor) -> torch.Tensor:
        return weights / weights.sum()

    eye = torch.eye(8, dtype=torch.double)
    for turn in range(8):
        p, q = norm(random()), norm(random())
        yield Pair(p, q, q)
        yield Pair(p, None, eye[turn])
        yield Pair(p, eye[turn], eye[turn])
        yield Pair(eye[turn], q, q)
        holes = norm(q.index_fill(0, torch.tensor([turn, (turn + 3) % 8]), 0.0))
        yield Pair(p, holes, holes)
        yield Pair(holes, q, q)
        near = norm(p * (1 + 1e-9 * random()))
        yield Pair(p, near, near)
        top = [_top(p, 4), _top(q, 4)]
        yield Pair(top[0], top[1], top[1])


def _top(p: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest entries, normalised."""
    kept = torch.zeros_like(p).scatter(0, p.topk(count).indices, 1.0)
    return p * kept / (p * kept).sum()


def random_law(seed: int) -> Law:
    """A distribution of the next word after every text of up to `LENGTH` words."""
    generator = torch.Generator().manual_seed(seed)
    texts = [t for n in range(LENGTH + 1) for t in itertools.product(range(WORDS), repeat=n)]
    return {
        t: torch.rand(WORDS, generator=generator, dtype=torch.double).softmax(-1) for t in texts
    }


def sampled_drafts(law: Law) -> Callable[[Text, int], Iterator[tuple[float, Draft]]]:
    """Every chain that can be drawn from `law`, with its chance and its q."""

    def drafts(text: Text, size: int) -> Iterator[tuple[float, Draft]]:
        for tokens in itertools.product(range(WORDS), repeat=size):
            q = [law[(*text, *tokens[:place])] for place in range(size)]
            chance = 1.0
            for token, row in zip(tokens, q, strict=True):
                chance *= float(row[token])
            yield chance, Draft(list(tokens), torch.stack(q) if q else None)

    return drafts


def certain_drafts(text: Text, size: int) -> Iterator[tuple[float, Draft]]:
    """One chain, as a lookup would give it."""
    yield 1.0, Draft([(sum(text) + place) % WORDS for place in range(size)])


def certain_trees(text: Text, size: int) -> Iterator[tuple[float, Draft]]:
    """One tree: two words to begin with, and a branch under the second."""
    first = sum(text) % WORDS
    if size == 0:
        yield 1.0, Draft([])
    elif size == 1:
        yield 1.0, Draft([first, (first + 1) % WORDS], parents=[ROOT, ROOT])
    else:
        yield 1.0, Draft([first, (first + 1) % WORDS, first], parents=[ROOT, ROOT, 1])


def _chain(
    law: Law, text: Text, draft: Draft, judge: Judged, accept: Accept
) -> Iterator[tuple[float, Text]]:
    """Every way on from `text`: its chance, and the text it makes."""
    size = len(draft.tokens)
    p = torch.stack([law[(*text, *draft.tokens[:place])] for place in range(size + 1)])
    chances = accept(p[:size], draft.q, torch.tensor(draft.tokens)).tolist() if size else []
    for accepted in range(size + 1):
        chance = 1.0
        for place in range(accepted):
            chance *= chances[place]
        uniform = [one / 2 for one in chances[:accepted]]
        if accepted < size:
            chance *= 1 - chances[accepted]
            uniform += [(1 + chances[accepted]) / 2] + [0.0] * (size - accepted - 1)
        if chance == 0:
            continue
        said, after = judge(p, draft, torch.tensor(uniform, dtype=torch.double))
        for word, weight in enumerate(after.tolist()):
            yield chance * weight, (*text, *draft.tokens[:said], word)


def _tree(law: Law, text: Text, draft: Draft, walk: Walk) -> Iterator[tuple[float, Text]]:
    """Every way on from `text` through a one-hot draft of any form."""
    paths: dict[int, Text] = {ROOT: ()}
    for place, (parent, token) in enumerate(zip(draft.follows(), draft.tokens, strict=True)):
        paths[place] = (*paths[parent], token)
    rows = [law[(*text, *paths[place])].tolist() for place in (ROOT, *range(len(draft.tokens)))]
    for said in itertools.product(range(WORDS), repeat=len(rows)):
        chance = 1.0
        for word, row in zip(said, rows, strict=True):
            chance *= row[word]
        yield chance, (*text, *walk(said, draft).tokens)


def joint(
    drafts: Callable[[Text, int], Iterator[tuple[float, Draft]]],
    ways: Callable[[Text, Draft], Iterator[tuple[float, Text]]],
    text: Text = (),
) -> dict[Text, float]:
    """Probability of every full text that begins with `text`."""
    if len(text) >= LENGTH:
        return {text[:LENGTH]: 1.0}
    out: dict[Text, float] = {}
    for chance, draft in drafts(text, min(AHEAD, LENGTH - len(text) - 1)):
        for step, grown in ways(text, draft):
            if len(grown) <= len(text):
                raise ValueError("the rule of acceptance said nothing: every pass adds a token.")
            for end, rest in joint(drafts, ways, grown).items():
                out[end] = out.get(end, 0.0) + chance * step * rest
    return out


def _distance(law: Law, found: Mapping[Text, float]) -> float:
    """Largest |found - product of the law|."""
    worst = 0.0
    for text in itertools.product(range(WORDS), repeat=LENGTH):
        product = 1.0
        for place, word in enumerate(text):
            product *= float(law[text[:place]][word])
        worst = max(worst, abs(found.get(text, 0.0) - product))
    return worst


def check(
    *,
    accept: Accept | None = None,
    residual: Residual | None = None,
    judge: Judged | None = None,
    walk: Walk | None = None,
) -> RuleCheck:
    """Try the rule of `_verify`, or the parts given instead."""
    accept = accept or _verify.accept_probability
    residual = residual or _verify.residual
    judged, walked = judge or _verify.judge, walk or _verify.walk
    tried = list(pairs())
    identity = max(float((emitted(one, accept, residual) - one.p).abs().max()) for one in tried)
    laws = [random_law(seed) for seed in range(LAWS)]
    chains = [
        _distance(law, joint(drafts, lambda t, d, law=law: _chain(law, t, d, judged, accept)))  # type: ignore[misc]
        for seed, law in enumerate(laws)
        for drafts in (sampled_drafts(random_law(100 + seed)), certain_drafts)
    ]
    trees = [
        _distance(law, joint(drafts, lambda t, d, law=law: _tree(law, t, d, walked)))  # type: ignore[misc]
        for law in laws
        for drafts in (certain_trees, certain_drafts)
    ]
    return RuleCheck(
        pairs=len(tried),
        identity_error=identity,
        texts=(len(chains) + len(trees)) * WORDS**LENGTH,
        chain_error=max(chains),
        tree_error=max(trees),
        bound=BOUND,
    )


def wrong(found: RuleCheck) -> bool:
    """Whether any identity is missed by more than rounding."""
    return max(found.identity_error, found.chain_error, found.tree_error) > found.bound
