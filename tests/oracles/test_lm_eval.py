"""Our rolling log-likelihood beside lm-evaluation-harness' own, on one model.

The harness does everything on its side: its windows, its forward passes, its sums, its perplexity.
"""

from __future__ import annotations

import pytest
import torch

from compresskit.artefact import find_model
from compresskit.device import resolve
from compresskit.engines.native import Native
from compresskit.quality.rolling import byte_perplexity, rolling, word_perplexity
from compresskit.spec import ModelSpec
from compresskit.text import load

pytestmark = pytest.mark.slow

MAX_LENGTH = 64


@pytest.fixture(
    scope="module",
    params=["tiny", pytest.param("pypi:smollm2-135m", marks=pytest.mark.real_model)],
)
def system(request):
    torch.set_num_threads(1)
    path = find_model(ModelSpec(name=request.param)).path
    with Native().open(path, ModelSpec(dtype="float32"), resolve("cpu")) as system:
        yield system


@pytest.fixture(scope="module")
def documents():
    text = load("embedded").content
    # Several windows with a short tail; less than one window; white space at both ends.
    return [text[:2000], text[5000:5060], f" \n{text[7000:7700]}\n\n"]


@pytest.fixture(scope="module")
def harness(system):
    pytest.importorskip(
        "lm_eval", reason="the oracle needs lm-eval: pip install 'compresskit[lm-eval]'"
    )
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=system.model,
        tokenizer=system.tokenizer.inner,
        max_length=MAX_LENGTH,
        batch_size=1,
        # The harness puts the prefix token itself; one from the tokenizer would be a second.
        add_bos_token=False,
    )


@pytest.fixture(scope="module")
def theirs(harness, documents):
    from lm_eval.api.instance import Instance

    requests = [
        Instance("loglikelihood_rolling", {}, (document,), index)
        for index, document in enumerate(documents)
    ]
    return harness.loglikelihood_rolling(requests, disable_tqdm=True)


def test_log_likelihoods_agree(system, documents, theirs):
    ours = [rolling(system, document, MAX_LENGTH).log_likelihood for document in documents]
    # Sums of hundreds of float32 terms; the relative bound is for the longer sums.
    assert ours == pytest.approx(theirs, abs=1e-3, rel=2e-6)


def test_perplexities_agree(system, documents, theirs):
    """Words and bytes as the harness' task `wikitext` counts them."""
    from lm_eval.api.metrics import weighted_perplexity
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    ours = [rolling(system, document, MAX_LENGTH) for document in documents]
    counted = [
        process_results({"page": document}, [value])
        for document, value in zip(documents, theirs, strict=True)
    ]
    for name, perplexity in (
        ("word_perplexity", word_perplexity),
        ("byte_perplexity", byte_perplexity),
    ):
        expected = weighted_perplexity([result[name] for result in counted])
        assert perplexity(ours) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"max_length": MAX_LENGTH - 1}, {"prefix": 5}])
def test_other_windows_or_prefixes_would_be_noticed(system, documents, theirs, wrong):
    """Negative control."""
    options = {"max_length": MAX_LENGTH, **wrong}
    ours = [rolling(system, document, **options).log_likelihood for document in documents]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1e-2
