"""Sampling through drafts: the joint distribution of three tokens is the model's.

Marginals would miss mistakes that act only after a rejection, such as a wrong rollback.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

from compresskit.hf import slots
from compresskit.methods.speculative import _verify
from compresskit.methods.speculative._draft import Draft, EachRow
from compresskit.methods.speculative._loop import speculate
from compresskit.methods.speculative.ngram import NGram
from compresskit.sampling import probabilities
from compresskit.spec import SamplingSpec

V, LENGTH, DRAWS = 5, 3, 800


class Always:
    """Drafts a fixed pattern, right or wrong."""

    def observe(self, tokens):
        self.seen = getattr(self, "seen", 0) + len(tokens)

    def draft(self, limit):
        return Draft([(self.seen + i) % V for i in range(min(limit, 2))])


@pytest.fixture(scope="module")
def system(lab):
    return lab.system("llama", vocabulary=V)


@pytest.fixture(scope="module")
def prompt(lab):
    return lab.prompt(6, vocabulary=V, seed=4)


@torch.inference_mode()
def joint(system, prompt, sampling):
    """Exact probability of every answer of `LENGTH` tokens, by enumeration."""
    answers = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    texts = torch.cat((prompt.expand(len(answers), -1), answers), dim=-1)
    logits = system.step(texts, system.new_cache(0), keep=LENGTH + 1)[:, :-1]
    p = probabilities(logits, sampling).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    return p.double().prod(-1)


def p_value(lab, system, prompt, sampling, make):
    """Chi-square of `DRAWS` answers against the exact distribution; rare answers are pooled."""
    counts = torch.zeros(V**LENGTH, dtype=torch.double)
    weights = torch.tensor([V**2, V, 1])
    for seed in range(DRAWS):
        request = lab.request(prompt, LENGTH, sampling=sampling, seed=seed)
        answer = torch.tensor(lab.rows(make(request))[0])
        counts[(answer * weights).sum()] += 1
    expected = joint(system, prompt, sampling) * DRAWS
    assert abs(expected.sum() - DRAWS) < 1e-2
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    pooled = [torch.cat((x[~rare], x[rare].sum(0, keepdim=True))) for x in (counts, expected)]
    observed, wanted = (x[pooled[1] > 0].numpy() for x in pooled)
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


PLAIN = SamplingSpec(temperature=1.0)
FILTERED = SamplingSpec(temperature=1.3, top_k=4, top_p=0.9, min_p=0.02)


@pytest.mark.parametrize(
    ("sampling", "lookup"),
    [(PLAIN, True), (PLAIN, False), (FILTERED, False)],
    ids=["lookup", "fixed draft", "fixed draft, filtered"],
)
def test_the_joint_of_three_tokens_is_the_models(lab, system, prompt, sampling, lookup):
    method = NGram().apply(system, None)
    make = (
        method.generate
        if lookup
        else lambda request: speculate(system, request, EachRow([Always()]))
    )
    assert p_value(lab, system, prompt, sampling, make) > 1e-3


def test_the_same_seed_gives_the_same_tokens(lab, system, prompt):
    method = NGram().apply(system, None)

    def run(seed):
        return lab.rows(method.generate(lab.request(prompt, 40, sampling=PLAIN, seed=seed)))

    assert run(5) == run(5)
    assert run(5) != run(6)


def accept_more(p, q, tokens):
    return torch.sqrt(p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))


def keep_rejected(p, q, token):
    return p


def wrong_neighbour(p, q, token):
    left = p.clone()
    left[(token + 1) % V] = 0
    return left / left.sum()


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (_verify, "accept_probability", accept_more),
        (_verify, "residual", keep_rejected),
        (_verify, "residual", wrong_neighbour),
        (slots, "roll_back", lambda cache, n: None),
    ],
    ids=["accepts too often", "rejected token comes back", "residual off by one", "no rollback"],
)
def test_mistakes_are_caught(lab, system, prompt, module, name, wrong, monkeypatch):
    monkeypatch.setattr(module, name, wrong)
    caught = p_value(
        lab, system, prompt, PLAIN, lambda r: speculate(system, r, EachRow([Always()]))
    )
    assert caught < 1e-6
