"""The audit on another library's loops: transformers' assisted generation.

Drafts of a model and prompt lookup are lossless there and must pass; mixing the assistant into the
target is lossy by design and must not. `generate` tells of no drafts, so the audit goes by the
tokens alone.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from compresskit import assets
from compresskit.audit.answer import Answered
from compresskit.audit.conduct import conduct, laws, plainly
from compresskit.audit.document import Asked
from compresskit.spec import SamplingSpec

DRAFT = 3
# Half the draws of the default: generate takes some 10 ms for three tokens.
ASKED = Asked(draws=320, detect=0.2, prompts=6, greedy_tokens=16)


def load(name):
    model = AutoModelForCausalLM.from_pretrained(assets.tiny_path(name)).eval()
    # A stop token of the checkpoint would stand in wherever a request has none.
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def target():
    return load("target")


@pytest.fixture(scope="module")
def assistant():
    """A draft of fixed length: no schedule, and no end at an unlikely token."""
    model = load("draft")
    model.generation_config.num_assistant_tokens = DRAFT
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@pytest.fixture(scope="module")
def audited(open_stack, target):
    with open_stack() as opened:
        plain = plainly(opened.system)
        law = laws(plain, ASKED)

        def audit(model=target, assistant=None, **settings):
            return conduct(
                sampler(model, assistant, **settings), plain, ASKED, label="transformers", model="tiny",
                cells=law, rule=False,
            )  # fmt: skip

        yield audit


def sampler(model, assistant=None, **settings):
    """Answers by `generate`, a row at a time."""

    def answer(request, enough):
        rows = []
        for row, tokens in enumerate(request.tokens):
            ids = tokens if request.mask is None else tokens[request.mask[row]]
            config = GenerationConfig(
                max_new_tokens=request.max_new_tokens,
                eos_token_id=list(request.stop) or None,
                pad_token_id=0,
                **drawn(request.sampling),
                **settings,
            )
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(request.seed * 1000 + row)
                mask = torch.ones_like(ids[None])
                out = model.generate(
                    ids[None],
                    attention_mask=mask,
                    generation_config=config,
                    assistant_model=assistant,
                )
            rows.append(out[0, len(ids) :].tolist())
        return Answered(rows)

    return answer


def drawn(sampling: SamplingSpec) -> dict[str, object]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }


@pytest.mark.slow
def test_drafts_of_a_model_pass(audited, assistant):
    found = audited(assistant=assistant)
    assert found.verdict == "lossless", found.reasons


@pytest.mark.slow
def test_prompt_lookup_passes(audited):
    found = audited(prompt_lookup_num_tokens=DRAFT)
    assert found.verdict == "lossless", found.reasons


def test_a_target_mixed_with_the_assistant_does_not_pass(audited, assistant):
    """Lossy by design: `assistant_ensemble_weight` verifies against a mixture of both."""
    found = audited(assistant=assistant, assistant_ensemble_weight=0.5)
    assert found.verdict == "lossy"
    assert {reason.partition(":")[0] for reason in found.reasons} >= {"sampled"}


def test_another_model_does_not_pass(audited):
    """Negative control: the draft alone, sampled plainly."""
    found = audited(load("draft"))
    assert found.verdict == "lossy"
    assert {reason.partition(":")[0] for reason in found.reasons} >= {"greedy", "sampled"}
