"""Rolling windows: every token once, as much context as fits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from compresskit.errors import InputError, SpecError
from compresskit.quality import rolling as module
from compresskit.quality.rolling import Rolling, byte_perplexity, rolling, windows, word_perplexity

DOCUMENT = "the cat sat on the mat and ate."


@pytest.mark.parametrize("count", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_each_token_is_scored_once_after_its_predecessor(count, length):
    ids = list(range(1, count + 1))
    found = list(windows(ids, 0, length))
    assert [t for window in found for t in window.targets] == ids
    for window in found:
        assert len(window.inputs) <= length
        assert window.inputs[-1] == window.targets[-1] - 1


def test_a_short_tail_gets_all_the_context():
    assert list(windows([1, 2, 3, 4, 5], 0, 4))[-1] == ((1, 2, 3, 4), (5,))


def test_an_empty_document_has_no_windows():
    assert list(windows([], 0, 4)) == []


def test_it_is_the_sum_of_conditional_log_likelihoods(system):
    found = rolling(system, DOCUMENT, 256)
    stream = torch.tensor([[256, *DOCUMENT.encode()]])
    with torch.inference_mode():
        log_q = system.model(input_ids=stream).logits.log_softmax(-1)[0]
    expected = sum(float(log_q[at, token]) for at, token in enumerate(DOCUMENT.encode()))
    assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert (found.words, found.bytes) == (8, 31)


def test_small_forward_passes_give_the_same(system, monkeypatch):
    whole = rolling(system, DOCUMENT, 12)
    monkeypatch.setattr(module, "LARGEST_FORWARD", 5 * 300 * 4)
    assert rolling(system, DOCUMENT, 12).log_likelihood == pytest.approx(whole.log_likelihood)


def test_max_length_and_prefix_matter(system):
    base = rolling(system, DOCUMENT, 256).log_likelihood
    assert rolling(system, DOCUMENT, 4).log_likelihood != base
    assert rolling(system, DOCUMENT, 256, prefix=7).log_likelihood != base


def test_words_are_counted_on_the_original():
    # The empty words at both ends are part of the definition.
    assert word_count(" a b c\n") == 5


def word_count(original):
    import re

    return len(re.split(r"\s+", original))


def test_sizes_are_those_of_the_original(system):
    found = rolling(system, "a b c", 256, original=" a b c\n")
    assert (found.words, found.bytes) == (5, 7)


def test_prefix_is_bos_or_else_end_of_text(system, bytes_tokenizer):
    def with_tokens(bos_id, eos_ids):
        tokenizer = bytes_tokenizer(eos_ids=eos_ids)
        tokenizer.bos_id = bos_id
        return replace(system, tokenizer=tokenizer)

    expected = rolling(system, DOCUMENT, 256, prefix=3)
    assert rolling(with_tokens(3, (4,)), DOCUMENT, 256) == expected
    assert rolling(with_tokens(None, (3,)), DOCUMENT, 256) == expected
    with pytest.raises(InputError, match="name the prefix"):
        rolling(with_tokens(None, ()), DOCUMENT, 256)


@pytest.mark.parametrize("length", [0, 257])
def test_max_length_must_fit(system, length):
    with pytest.raises(SpecError, match="max_length"):
        rolling(system, DOCUMENT, length)


def test_perplexities_pool_documents():
    documents = [Rolling(-10.0, 4, 20), Rolling(-2.0, 2, 4)]
    assert word_perplexity(documents) == pytest.approx(math.exp(12 / 6))
    assert byte_perplexity(documents) == pytest.approx(math.exp(12 / 24))
