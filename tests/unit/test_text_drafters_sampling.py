"""Sampling through suffixes and recycled trees: the joint law of four tokens is the model's.

One comes with the prompt, up to three with the first draft, the rest from a cache that was cut.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

from compresskit.methods.speculative import _base
from compresskit.methods.speculative._verify import verify
from compresskit.methods.speculative.suffix import Suffix
from compresskit.methods.speculative.token_recycling import TokenRecycling
from compresskit.sampling import probabilities
from compresskit.spec import SamplingSpec

V, LENGTH, DRAWS = 4, 4, 700
SAMPLING = SamplingSpec(temperature=1.2, top_k=3)
METHODS = {
    "suffix": Suffix(draft=2, factor=2.0, min_probability=0.0),
    "recycling": TokenRecycling(draft=2, nodes=5, successors=3, shared=True),
}


@torch.inference_mode()
def exact(system, prompt):
    """Probability of every answer of `LENGTH` tokens, by enumeration."""
    answers = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    texts = torch.cat((prompt.expand(len(answers), -1), answers), dim=-1)
    logits = system.step(texts, system.new_cache(0), keep=LENGTH + 1)[:, :-1]
    p = probabilities(logits, SAMPLING).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    return p.double().prod(-1)


def p_value(lab, method):
    """Chi-square of `DRAWS` answers against the exact law, and how many drafted tokens stayed."""
    system, prompt = lab.system("llama", vocabulary=V), lab.prompt(6, vocabulary=V, seed=4)
    applied = method.apply(system, None)
    counts, accepted = torch.zeros(V**LENGTH, dtype=torch.double), 0
    for seed in range(DRAWS):
        request = lab.request(prompt, LENGTH, sampling=SAMPLING, seed=seed)
        chunks = list(applied.generate(request))
        (answer,) = lab.rows(chunks)
        counts[(torch.tensor(answer) * torch.tensor([V**3, V**2, V, 1])).sum()] += 1
        accepted += sum(chunk.accepted for chunk in chunks)
    expected = exact(system, prompt) * DRAWS
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    pooled = [torch.cat((x[~rare], x[rare].sum(0, keepdim=True))) for x in (counts, expected)]
    observed, wanted = (x[pooled[1] > 0].numpy() for x in pooled)
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue, accepted


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_joint_of_four_tokens_is_the_models(lab, method):
    found, accepted = p_value(lab, method)
    assert accepted > DRAWS / 10
    assert found > 1e-3


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_taking_drafts_that_were_not_said_is_caught(lab, method, monkeypatch):
    def greedy_half(logits, drafts, sampling, generator):
        """Sometimes judges as if at temperature 0."""
        coin = torch.rand(1, generator=generator)
        if coin < 0.5:
            return verify(logits, drafts, SamplingSpec(), None)
        return verify(logits, drafts, sampling, generator)

    monkeypatch.setattr(_base, "verify", greedy_half)
    assert p_value(lab, method)[0] < 1e-6
