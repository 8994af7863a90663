"""The accept rule keeps the target distribution, exactly; the index finds what a search would."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from compresskit.methods.speculative._draft import Draft
from compresskit.methods.speculative._verify import (
    accept_probability,
    judge,
    residual,
    verify,
)
from compresskit.methods.speculative.ngram import Lookup
from compresskit.spec import SamplingSpec

torch.set_num_threads(1)

weights = st.lists(
    st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0, 3.0]) | st.floats(0.01, 1), min_size=4, max_size=4
)
distributions = weights.filter(lambda w: sum(w) > 0.01).map(
    lambda w: torch.tensor(w, dtype=torch.double) / sum(w)
)


def emitted(p, q, drawn):
    """Distribution of the token that comes out when the draft is `drawn` with probability q."""
    out = torch.zeros_like(p)
    for token, chance in enumerate(drawn.tolist()):
        if chance == 0:
            continue
        given_q = None if q is None else q[None]
        accept = float(accept_probability(p[None], given_q, torch.tensor([token])))
        out[token] += chance * accept
        if accept < 1:
            out += chance * (1 - accept) * residual(p, q, token)
    return out


@given(p=distributions, q=distributions)
def test_a_sampled_draft_leaves_the_target(p, q):
    assert (emitted(p, q, q) - p).abs().max() < 1e-12


@given(p=distributions, token=st.integers(0, 3))
def test_a_certain_draft_leaves_the_target(p, token):
    one_hot = torch.eye(4, dtype=torch.double)[token]
    assert (emitted(p, None, one_hot) - p).abs().max() < 1e-12


@given(p=distributions, token=st.integers(0, 3))
def test_no_q_means_one_hot(p, token):
    one_hot = torch.eye(4, dtype=torch.double)[token]
    chosen = torch.tensor([token])
    assert torch.equal(
        accept_probability(p[None], None, chosen),
        accept_probability(p[None], one_hot[None], chosen),
    )
    if p[token] < 1:
        assert (residual(p, None, token) - residual(p, one_hot, token)).abs().max() < 1e-15


def test_known_values():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
    chance = accept_probability(p.expand(3, -1), q.expand(3, -1), torch.arange(3))
    assert float((q * chance).sum()) == pytest.approx(0.7)
    assert residual(p, q, 1).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("p", "q", "drawn", "wrong"),
    [
        # The draft is an arg max, but its softmax is passed as q.
        ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0, 1, 0], [0.4, 0.6, 0]),
        # q before the top-k filter, drawn after it.
        ([0.4, 0.4, 0.2], [0.5, 0.3, 0.2], [0.625, 0.375, 0], [0.5, 0.5, 0]),
    ],
)
def test_a_q_that_the_draft_was_not_drawn_from_is_visible(p, q, drawn, wrong):
    p, q, drawn = (torch.tensor(x, dtype=torch.double) for x in (p, q, drawn))
    out = emitted(p, q, drawn)
    assert out.tolist() == pytest.approx(wrong)
    assert (out - p).abs().sum() / 2 > 0.1


# The real rule, driven through every branch


V, G, LENGTH = 3, 2, 3


def law(seed):
    """A random conditional distribution for every text of up to `LENGTH` tokens."""
    generator = torch.Generator().manual_seed(seed)
    texts = [t for n in range(LENGTH + 1) for t in itertools.product(range(V), repeat=n)]
    return {t: torch.rand(V, generator=generator, dtype=torch.double).softmax(-1) for t in texts}


def branches(p, draft):
    """Every outcome of `judge` with its probability, through uniforms chosen to reach it."""
    k = len(draft.tokens)
    chances = accept_probability(p[:k], draft.q, torch.tensor(draft.tokens)).tolist() if k else []
    for accepted in range(k + 1):
        probability = 1.0
        for place in range(accepted):
            probability *= chances[place]
        uniform = [chance / 2 for chance in chances[:accepted]]
        if accepted < k:
            probability *= 1 - chances[accepted]
            uniform += [(1 + chances[accepted]) / 2] + [0.0] * (k - accepted - 1)
        if probability == 0:
            continue
        said, after = judge(p, draft, torch.tensor(uniform, dtype=torch.double))
        assert said == accepted
        yield probability, accepted, after


def joint(target, drafter, text=()):
    """Distribution of the finished texts when `target` verifies `drafter` from `text` on."""
    if len(text) == LENGTH:
        return {text: 1.0}
    out: dict[tuple[int, ...], float] = {}
    size = min(G, LENGTH - len(text) - 1)
    for chance, draft in drafter(text, size):
        p = torch.stack([target[(*text, *draft.tokens[:i])] for i in range(len(draft.tokens) + 1)])
        for branch, accepted, after in branches(p, draft):
            for last, weight in enumerate(after.tolist()):
                grown = (*text, *draft.tokens[:accepted], last)
                for end, rest in joint(target, drafter, grown).items():
                    out[end] = out.get(end, 0.0) + chance * branch * weight * rest
    return out


def sampled(draft_law):
    def drafter(text, size):
        for tokens in itertools.product(range(V), repeat=size):
            q = [draft_law[(*text, *tokens[:i])] for i in range(size)]
            chance = 1.0
            for token, row in zip(tokens, q, strict=True):
                chance *= float(row[token])
            yield chance, Draft(list(tokens), torch.stack(q) if q else None)

    return drafter


def certain(text, size):
    yield 1.0, Draft([(sum(text) + i) % V for i in range(size)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["sampled", "certain"])
def test_every_branch_of_a_chain_adds_up_to_the_target(seed, kind):
    target = law(seed)
    out = joint(target, sampled(law(seed + 100)) if kind == "sampled" else certain)
    assert len(out) == V**LENGTH
    for text, probability in out.items():
        exact = 1.0
        for place, token in enumerate(text):
            exact *= float(target[text[:place]][token])
        assert probability == pytest.approx(exact, abs=1e-12)


def test_a_uniform_of_zero_accepts_nothing_impossible():
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    accepted, after = judge(p, Draft([0]), torch.zeros(1))
    assert accepted == 0
    assert after.tolist() == [0, 1]


def greedy(draft):
    """What a row says whose model would go on with 2, 4, 1, 5."""
    logits = torch.eye(6)[[2, 4, 1, 5]][: len(draft.tokens) + 1]
    (verdict,) = verify(logits[None], [draft], SamplingSpec(), None)
    return verdict


def test_greedy_accepts_while_the_draft_is_the_arg_max():
    assert greedy(Draft([2, 4, 1])) == ([2, 4, 1, 5], [0, 1, 2])
    assert greedy(Draft([2, 3, 1])) == ([2, 4], [0])
    assert greedy(Draft([0, 4, 1])) == ([2], [])
    assert greedy(Draft([])) == ([2], [])


def test_greedy_goes_down_the_branch_that_the_model_says():
    # Logits follow the tokens: after the root 2, after place 0 (the wrong token) 4, after place 1 ...
    logits = torch.eye(6)[[2, 4, 1, 5]]
    tree = Draft([0, 2, 1], parents=[-1, -1, 1])
    (verdict,) = verify(logits[None], [tree], SamplingSpec(), None)
    assert verdict == ([2, 1, 5], [1, 2])
    # The same token under another parent is not on the way.
    (verdict,) = verify(logits[None], [tree._replace(parents=[-1, -1, 0])], SamplingSpec(), None)
    assert verdict == ([2, 1], [1])


# The index


def search(text, *, longest, shortest, newest, limit):
    """What the index should say, by looking through the whole text."""
    for size in range(longest, shortest - 1, -1):
        ends = [
            end
            for end in range(size, len(text))
            if size <= len(text) and text[end - size : end] == text[len(text) - size :]
        ]
        if ends:
            start = ends[-1] if newest else ends[0]
            longer = list(text)
            for place in range(limit):
                longer.append(longer[start + place])
            return longer[len(text) :]
    return []


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    longest=st.integers(1, 4),
    shortest=st.integers(1, 4),
    match=st.sampled_from(["last", "first"]),
    limit=st.integers(1, 9),
)
def test_the_index_equals_a_search(text, cuts, longest, shortest, match, limit):
    shortest = min(shortest, longest)
    index = Lookup(longest=longest, shortest=shortest, match=match, draft=limit)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        index.observe(text[start:end])
    expected = search(text, longest=longest, shortest=shortest, newest=match == "last", limit=limit)
    assert index.draft(limit).tokens == expected
