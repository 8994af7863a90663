"""A student whose tokenizer is not the baseline's: bits per byte and tasks, nothing token by token."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from compresskit.quality import tokens
from compresskit.quality.batches import score_pair
from compresskit.quality.evaluate import evaluate
from compresskit.quality.protocol import plan as plan_of
from compresskit.text import load

EVALUATION = {"cache_changed": False, "batch_allowed": True, "baseline_digest": "0" * 12}


@pytest.fixture
def shifted(system, bytes_tokenizer):
    """The same model over a tokenizer that numbers bytes otherwise."""

    class Shifted(bytes_tokenizer):
        def encode(self, text, *, special=True):
            return [token + 20 for token in super().encode(text, special=special)]

        def decode(self, ids):
            return super().decode([token - 20 for token in ids])

    return replace(system, tokenizer=Shifted())


def test_what_counts_tokens_is_left_out_and_the_likelihood_stays(system, shifted, spec):
    found = evaluate(shifted, system, spec(protocol="window"), **EVALUATION)
    assert found.fidelity is None
    assert found.greedy is None
    (note,) = (one for one in found.notes if "another tokenizer" in one)
    assert "bits per byte" in note
    # A student is never its own baseline; its likelihood is that of a run on its own.
    alone = evaluate(shifted, None, spec(protocol="window"), **EVALUATION)
    assert found.likelihood == alone.likelihood
    assert found.likelihood.text == evaluate(system, None, spec(), **EVALUATION).likelihood.text
    assert (
        found.likelihood.protocol_id
        != evaluate(system, None, spec(protocol="window"), **EVALUATION).likelihood.protocol_id
    )


def test_what_is_refused_would_have_given_numbers(system, shifted, spec):
    """Negative control: nothing but the check keeps a KL between unlike tokens out."""
    text = load(spec().text)
    plan = plan_of(shifted, text, spec(), cache_changed=False, batch_allowed=True)
    assert score_pair(shifted, system, plan).kl.shape == (
        len(plan.rows),
        plan.scored_per_row,
    )
    assert not tokens.alike(shifted.tokenizer, system.tokenizer, text.content)


def test_equal_tokenizers_are_compared_whoever_made_them(system, bytes_tokenizer, spec):
    twin = replace(system, tokenizer=bytes_tokenizer())
    found = evaluate(twin, system, spec(), **EVALUATION)
    assert found.fidelity.kl.mean == 0
    assert found.greedy.exact_match == 1


def test_another_prefix_is_another_tokenizer(bytes_tokenizer):
    assert not tokens.alike(bytes_tokenizer(bos=True), bytes_tokenizer(), "text")


def test_a_head_of_another_width_leaves_the_greedy_comparison(lab, system, spec):
    padded = replace(lab.system("llama", vocabulary=320), tokenizer=system.tokenizer)
    found = evaluate(padded, system, spec(), **EVALUATION)
    assert found.fidelity is None
    assert found.greedy is not None
    assert any("320 and 300 places" in note for note in found.notes)


def test_bits_per_byte_count_the_bytes_that_were_scored(system, shifted, spec):
    found = evaluate(shifted, system, spec(protocol="window"), **EVALUATION).likelihood
    nats = found.nll_mean * found.scored_tokens
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.scored_bytes, rel=1e-5)


def test_the_real_tokenizers_of_a_trimmed_vocabulary_are_told_apart(open_stack):
    """Same cut of a text, fewer entries: the ids still mean what they meant, the whole does not."""
    with open_stack() as opened:
        whole = opened.system.tokenizer
    same = copy.deepcopy(whole)
    assert tokens.alike(whole, same, "One, two, three.")
    same.inner.add_tokens(["<never in a text>"])
    assert not tokens.alike(whole, same, "One, two, three.")
    assert torch.equal(
        torch.tensor(whole.encode("One, two")), torch.tensor(same.encode("One, two"))
    )
