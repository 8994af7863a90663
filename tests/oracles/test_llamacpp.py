"""Our likelihood beside llama.cpp's, on one GGUF file and the same tokens.

llama.cpp is an independent implementation of everything below the numbers: reading the file,
the model, the softmax. It quantises activations to 8 bits and keeps a float16 cache, so single
tokens differ (0.05 nats on average); means and most likely tokens have to agree. Greedy text does
not, and is no oracle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from compresskit.device import resolve
from compresskit.engines.native import Native
from compresskit.hf import sources
from compresskit.quality.evaluate import evaluate
from compresskit.quality.protocol import Cut
from compresskit.quality.score import nll
from compresskit.quality.walk import Span, hold, probe
from compresskit.spec import ModelSpec, QualitySpec
from compresskit.text import load

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

POSITIONS = 130
VOCABULARY = 49_152
SHORT_LIST = 1000
TOLERANCE = 0.02
"""Nats per token, of the means; measured: 0.005 here, 0.010 on WikiText-2."""
AGREEMENT = 0.90
"""Share of positions with the same most likely token; measured: 0.94 here, 0.96 on WikiText-2."""


@pytest.fixture(scope="module")
def source():
    return sources.resolve("pypi:smollm2-135m")


@pytest.fixture(scope="module")
def system(source):
    torch.set_num_threads(1)
    with Native().open(source.path, ModelSpec(dtype="float32"), resolve("cpu")) as system:
        yield system


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    # Running English, unlike the shipped text, which is written for the tiny models.
    path = tmp_path_factory.mktemp("oracle") / "text.txt"
    path.write_text(load("pydoc").content[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ids(system, text):
    return system.tokenizer.encode(text.read_text(encoding="utf-8"), special=False)[: POSITIONS + 1]


class Prediction(NamedTuple):
    """llama.cpp's next token: the most likely one, and how likely the true one was."""

    top: int
    nll: float


@pytest.fixture(scope="module")
def server(source):
    xllamacpp = pytest.importorskip(
        "xllamacpp", reason="the oracle needs llama.cpp: pip install 'compresskit[llamacpp]'"
    )
    params = xllamacpp.CommonParams()
    params.model.path = str(source.gguf)
    params.n_ctx, params.n_parallel = 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    return xllamacpp.Server(params)


def log_probabilities(server, prompt, count):
    """The `count` most likely next tokens, most likely first, with their log probabilities."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": count,
            "cache_prompt": True,
            "post_sampling_probs": False,
            "samplers": ["temperature"],
        }
    )
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}


@pytest.fixture(scope="module")
def llama(server, ids):
    """A prediction for every position."""

    def predict(prompt, target):
        # The whole vocabulary takes a second of JSON. The probabilities of a short list are
        # normalised over the whole one all the same, but the true token may not be in it.
        found = log_probabilities(server, prompt, SHORT_LIST)
        if target not in found:
            found = log_probabilities(server, prompt, VOCABULARY)
        return Prediction(next(iter(found)), -found[target])

    return [predict(ids[:stop], ids[stop]) for stop in range(1, POSITIONS + 1)]


@pytest.fixture(scope="module")
def logits(system, ids):
    tokens = torch.tensor([ids])
    span = Span(0, POSITIONS)
    return hold(system, tokens, [Cut(0, POSITIONS, True)], span, probe(system, ids))[0]


def mean_nll(predictions):
    return sum(prediction.nll for prediction in predictions) / len(predictions)


def agreement(logits, predictions):
    same = [a == b.top for a, b in zip(logits.argmax(-1).tolist(), predictions, strict=True)]
    return sum(same) / len(same)


def test_its_numbers_are_log_probabilities_over_the_whole_vocabulary(server, ids):
    whole = log_probabilities(server, ids[:20], VOCABULARY)
    short = log_probabilities(server, ids[:20], SHORT_LIST)
    assert len(whole) == VOCABULARY
    assert math.fsum(map(math.exp, whole.values())) == pytest.approx(1, abs=1e-3)
    assert max(abs(whole[token] - value) for token, value in short.items()) < 1e-4


def test_mean_likelihood_agrees(system, llama, text):
    spec = QualitySpec(text=str(text), protocol="window", tokens=POSITIONS, window=POSITIONS)
    ours = evaluate(
        system, None, spec, cache_changed=False, batch_allowed=True, baseline_digest="0" * 12
    ).likelihood
    assert ours.scored_tokens == POSITIONS
    assert ours.nll_mean == pytest.approx(mean_nll(llama), abs=TOLERANCE)


def test_most_likely_tokens_agree(logits, llama):
    assert agreement(logits, llama) >= AGREEMENT


def test_an_error_of_one_position_would_be_noticed(logits, llama, ids):
    """Negative control: our predictions beside those for the next position."""
    ours = nll(logits[None, :-1], torch.tensor([ids[2:]])).mean()
    assert abs(float(ours) - mean_nll(llama[1:])) > 1
    assert agreement(logits[:-1], llama[1:]) < 0.5
