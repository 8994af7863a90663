"""The acceptance rule on paper: ours adds up to p, and wrong ones are off by what theory says."""

from __future__ import annotations

import pytest
import torch

from compresskit.audit import rule
from compresskit.methods.speculative import _verify
from compresskit.methods.speculative._verify import Verdict, accept_probability, residual


def double(*weights):
    return torch.tensor(weights, dtype=torch.double)


def distance(out, p):
    return float((out - p).abs().sum() / 2)


def test_our_rule_is_exact():
    found = rule.check()
    assert not rule.wrong(found)
    assert max(found.identity_error, found.chain_error, found.tree_error) < 1e-12
    assert found.pairs >= 50


# Controls with known outputs: p is the target, q what is handed over, drawn the truth


P, Q = double(0.5, 0.3, 0.2), double(0.2, 0.5, 0.3)


def test_the_sound_rule_on_the_same_numbers():
    out = rule.emitted(rule.Pair(P, Q, Q), accept_probability, residual)
    assert distance(out, P) < 1e-15
    tokens = torch.arange(3)
    rate = Q * accept_probability(P.expand(3, -1), Q.expand(3, -1), tokens)
    assert float(rate.sum()) == pytest.approx(0.7)
    assert float((P * Q).sum()) == pytest.approx(
        0.31
    )  # strict: say y of p, go on if it is the draft


@pytest.mark.parametrize(
    ("p", "q", "drawn", "expected", "variation"),
    [
        (P, Q, double(0, 1, 0), [0.4, 0.6, 0.0], 0.3),
        (
            double(0.4, 0.4, 0.2),
            double(0.5, 0.3, 0.2),
            double(0.625, 0.375, 0.0),
            [0.5, 0.5, 0.0],
            0.2,
        ),
    ],
    ids=["arg max drafted, softmax handed over", "q before top-k, drawn after it"],
)
def test_a_q_that_was_not_drawn_from(p, q, drawn, expected, variation):
    out = rule.emitted(rule.Pair(p, q, drawn), accept_probability, residual)
    assert out.tolist() == pytest.approx(expected, abs=1e-12)
    assert distance(out, p) == pytest.approx(variation)
    honest = rule.emitted(rule.Pair(p, drawn, drawn), accept_probability, residual)
    assert distance(honest, p) < 1e-15


def test_a_target_mixed_with_the_draft():
    """Ensembles verify against (1 - w) p + w q, and get exactly that."""
    mixed = (P + Q) / 2
    out = rule.emitted(rule.Pair(mixed, Q, Q), accept_probability, residual)
    assert out.tolist() == pytest.approx([0.35, 0.4, 0.25], abs=1e-12)
    assert distance(out, P) == pytest.approx(0.15)


def test_an_unlikely_token_dropped_after_it_was_drawn():
    """Only tokens of at least tau are kept, the others are forgotten: a biased choice of drafts."""
    p, q, tau = double(0.5, 0.5), double(0.6, 0.4), 0.5
    out = torch.zeros(2, dtype=torch.double)
    for token, chance in enumerate(q.tolist()):
        if chance < tau:
            out += chance * p
            continue
        accepted = float(accept_probability(p[None], q[None], torch.tensor([token])))
        out[token] += chance * accepted
        out += chance * (1 - accepted) * residual(p, q, token)
    assert out.tolist() == pytest.approx([0.7, 0.3], abs=1e-12)
    assert distance(out, p) == pytest.approx(0.2)


# The check itself finds wrong rules


def accept_more(p, q, tokens):
    return accept_probability(p, q, tokens).sqrt()


def keep_rejected(p, q, token):
    return p


def wrong_neighbour(p, q, token):
    return residual(p, q, (token + 1) % p.shape[-1]) if q is None else residual(p, q.roll(1), token)


@pytest.mark.parametrize(
    "parts",
    [{"accept": accept_more}, {"residual": keep_rejected}, {"residual": wrong_neighbour}],
    ids=["accepts too often", "rejected token comes again", "off by one"],
)
def test_a_wrong_part_is_off_for_one_token(parts):
    found = rule.check(**parts)
    assert rule.wrong(found)
    assert found.identity_error > 0.01


def one_too_many(p, draft, uniform):
    """Accepts the first rejected token too."""
    accepted, after = _verify.judge(p, draft, uniform)
    return min(accepted + 1, len(draft.tokens)), after


def residual_a_place_late(p, draft, uniform):
    accepted, after = _verify.judge(p, draft, uniform)
    if accepted < len(draft.tokens):
        q = None if draft.q is None else draft.q[accepted]
        after = residual(p[accepted + 1], q, draft.tokens[accepted])
    return accepted, after


def bonus_from_the_place_before(p, draft, uniform):
    accepted, after = _verify.judge(p, draft, uniform)
    return accepted, p[max(accepted - 1, 0)] if accepted == len(draft.tokens) else after


@pytest.mark.parametrize(
    "judge", [one_too_many, residual_a_place_late, bonus_from_the_place_before]
)
def test_a_wrong_chain_is_off_though_each_part_is_right(judge):
    found = rule.check(judge=judge)
    assert found.identity_error < 1e-12
    assert found.chain_error > 1e-3
    assert rule.wrong(found)


def walk_to_the_first_child(said, draft):
    """Goes down a branch as soon as it begins there, whatever the model says."""
    return Verdict([draft.tokens[0], said[1]], [0]) if draft.tokens else Verdict([said[0]], [])


def walk_by_token_alone(said, draft):
    """Takes the same word under another parent for a child."""
    path, at = [], -1
    while said[at + 1] in draft.tokens[at + 1 :]:
        at = draft.tokens.index(said[at + 1], at + 1)
        path.append(at)
    return Verdict([*(draft.tokens[place] for place in path), said[at + 1]], path)


@pytest.mark.parametrize("walk", [walk_to_the_first_child, walk_by_token_alone])
def test_a_wrong_walk_is_off(walk):
    found = rule.check(walk=walk)
    assert found.chain_error < 1e-12
    assert found.tree_error > 1e-3
    assert rule.wrong(found)


def test_a_rule_that_says_nothing_is_no_endless_loop():
    with pytest.raises(ValueError, match="every pass adds a token"):
        rule.check(walk=lambda said, draft: Verdict([], []))
