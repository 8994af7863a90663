"""Summaries of per-token scores, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compresskit.errors import RunError
from compresskit.quality.fidelity import Scores, distribution, fidelity
from compresskit.quality.likelihood import likelihood
from compresskit.quality.protocol import Plan
from compresskit.text import Text

PLAN = Plan("id", Text("t", "abcdef"), 6, ((0, 1, 2), (2, 3, 4)), first=0, step=None, batch=1)


def floats(rows):
    return np.array(rows, dtype=np.float32)


def test_percentiles_are_numpy_s_linear_ones():
    found = distribution(floats([range(1, 6), range(6, 11)]))
    assert found.percentiles == pytest.approx(
        {"p50": 5.5, "p90": 9.1, "p95": 9.55, "p99": 9.91, "p99.9": 9.991, "max": 10}
    )
    assert found.mean == 5.5
    # Over windows: means 3 and 8.
    assert found.stderr == pytest.approx(2.5)


def test_pairing_takes_the_windows_own_difficulty_out():
    scores = Scores(
        nll=floats([[1.5, 2.5], [7.5, 8.5]]),
        baseline_nll=floats([[1, 2], [7, 8]]),
        kl=floats([[0, 0.25], [0.5, 0.25]]),
        agree=np.array([[True, True], [True, False]]),
    )
    found = fidelity(scores, PLAN, "0" * 12)
    assert (found.delta_nll, found.delta_nll_stderr, found.baseline_nll) == (0.5, 0, 4.5)
    assert found.top1_agreement == 0.75
    assert found.top1_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert found.scored_tokens == 4


def test_one_window_has_no_standard_error():
    assert distribution(floats([[1, 2, 3]])).stderr is None


def test_likelihood_formulae():
    found = likelihood(floats([[1, 3], [2, 2]]), PLAN, scored_bytes=8)
    assert (found.nll_mean, found.nll_stderr) == (2, 0)
    assert found.perplexity == pytest.approx(math.exp(2))
    assert found.bits_per_byte == pytest.approx(2 * 4 / 8 / math.log(2))
    assert found.text.tokens == 6


def test_text_of_no_bytes_has_no_bits_per_byte():
    with pytest.raises(RunError, match="decode to no text"):
        likelihood(floats([[1, 3], [2, 2]]), PLAN, scored_bytes=0)
