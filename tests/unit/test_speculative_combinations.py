"""Speculation on top of other methods gives the tokens of these methods, in fewer passes.

The products run by their plain formula: fast ones round differently by the number of rows, and a near
tie of two tokens would tell about that alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compresskit_kernels import dispatch

from compresskit import artefact, catalogue
from compresskit.decode import pad
from compresskit.errors import Conflict
from compresskit.measure.count import counting
from compresskit.spec import EngineSpec, ModelSpec, ProtocolSpec, RunSpec, SamplingSpec
from compresskit.system import Request

TEXTS = (
    "Once there was a small fox who lived near the garden. Once there was a small",
    "One, two, three, one, two, three, one,",
    "Note the code: Ann 3555.",
    "The",
)


def plan(*stack, mode="eager"):
    return artefact.plan(
        RunSpec(
            model=ModelSpec(name="tiny"),
            engine=EngineSpec(mode=mode),
            stack=tuple(catalogue.parse_method(text) for text in stack),
            device="cpu",
            protocol=ProtocolSpec(threads=1),
        )
    )


def answers(system, batch, new=32):
    tokens, mask = pad(
        [system.tokenizer.encode(text) for text in TEXTS[:batch]], device=torch.device("cpu")
    )
    system, counter = counting(system)
    rows = [[] for _ in range(batch)]
    for chunk in system.generate(Request(tokens, new, SamplingSpec(), mask=mask)):
        for row, ids, length in zip(
            rows, chunk.tokens.tolist(), chunk.lengths.tolist(), strict=True
        ):
            row += ids[:length]
    return rows, counter.calls


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "below",
    [
        ("quant/int8",),
        ("quant/int4",),
        ("kv/int8",),
        ("kv/rotate",),
        ("kv/static",),
        ("kv/none",),
        ("quant/int8", "kv/int8"),
    ],
    ids="+".join,
)
def test_on_top_of_other_methods(below, batch):
    with dispatch.forced("reference"):
        with artefact.opened(plan(*below)) as opened:
            expected, plain = answers(opened.system, batch)
        with artefact.opened(plan(*below, "speculative/ngram:draft=4")) as opened:
            found, passes = answers(opened.system, batch)
    assert found == expected
    assert passes < plain


@pytest.mark.parametrize("name", ["reuse/prefix_block", "reuse/prefix_radix"])
def test_on_prompts_that_were_seen_before(name):
    with artefact.opened(plan()) as opened:
        expected, plain = answers(opened.system, 1)
    with artefact.opened(plan(name, "speculative/ngram:draft=4")) as opened:
        first = answers(opened.system, 1)
        again = answers(opened.system, 1)
    assert first == again
    assert first[0] == expected
    assert first[1] < plain


@pytest.fixture(scope="module")
def compiled():
    """One compiled system with the widths of a draft of four, and its answers without drafts."""
    with artefact.opened(plan("speculative/ngram:draft=4", mode="compiled")) as opened:
        yield opened.system


@pytest.mark.parametrize("batch", [1, 4])
def test_compiled_blocks_of_two_widths(compiled, batch):
    widths, inner = set(), compiled.step

    def step(tokens, cache, **options):
        if int(cache.get_seq_length()):
            widths.add(tokens.shape[1])
        return inner(tokens, cache, **options)

    with artefact.opened(plan()) as opened:
        expected, plain = answers(opened.system, batch)
    found, passes = answers(replace(compiled, step=step), batch)
    assert found == expected
    assert passes < plain
    assert widths == {1, 5}


def test_what_cannot_take_tokens_back_is_refused_before_weights_are_loaded():
    with pytest.raises(Conflict, match="needs 'rollback', which kv/kivi does not leave"):
        plan("kv/kivi", "speculative/ngram").check()
