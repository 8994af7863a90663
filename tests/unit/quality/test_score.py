"""Per-token scores against their formulae."""

from __future__ import annotations

import math

import pytest
import torch

from compresskit.errors import RunError
from compresskit.quality import score

P, Q = (0.7, 0.2, 0.1), (0.6, 0.3, 0.1)


def logits(*rows):
    return torch.tensor([rows]).log()


def test_kl_is_directed():
    p, q = torch.tensor(P).log(), torch.tensor(Q).log()
    assert float(score.kl(p, q)) == pytest.approx(0.0268125, abs=1e-6)
    assert float(score.kl(q, p)) == pytest.approx(0.0291491, abs=1e-6)


def test_the_baseline_is_p():
    found = score.pair(logits(Q), logits(P), torch.tensor([[0]]))
    assert float(found.kl) == pytest.approx(0.0268125, abs=1e-6)
    assert float(found.nll) == pytest.approx(-math.log(0.6))
    assert float(found.baseline_nll) == pytest.approx(-math.log(0.7))
    assert found.agree.tolist() == [[True]]


def test_a_shift_of_the_logits_changes_nothing():
    found = score.pair(logits(Q) + 30, logits(P) - 5, torch.tensor([[1]]))
    assert float(found.kl) == pytest.approx(0.0268125, abs=1e-5)


def test_equal_logits_give_exactly_zero():
    x = torch.randn(2, 5, 1000) * 10
    found = score.pair(x, x.clone(), torch.randint(1000, (2, 5)))
    assert found.kl.abs().max() == 0
    assert bool(found.agree.all())
    assert torch.equal(found.nll, found.baseline_nll)


def test_kl_against_float64_and_torch():
    x, y = torch.randn(2, 3, 7, 500, dtype=torch.float64).unbind(0)
    found = score.pair(x.float(), y.float(), torch.zeros(3, 7, dtype=torch.long))
    q, p = x.log_softmax(-1), y.log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(found.kl.double(), expected, atol=1e-5)
    assert torch.equal(found.agree, q.argmax(-1) == p.argmax(-1))


def test_small_pieces_give_the_same(monkeypatch):
    x, y = torch.randn(2, 3, 11, 50).unbind(0)
    targets = torch.randint(50, (3, 11))
    whole, alone = score.pair(x, y, targets), score.nll(x, targets)
    monkeypatch.setattr(score, "_ROOM", 4 * 50 * 4)  # four rows at a time, over row borders
    for a, b in zip(whole, score.pair(x, y, targets), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(alone, score.nll(x, targets))
    assert torch.equal(alone, whole.nll)


def test_nll_is_cross_entropy_even_in_bfloat16():
    x, targets = torch.randn(2, 3, 50).bfloat16(), torch.randint(50, (2, 3))
    found = score.nll(x, targets)
    expected = torch.nn.functional.cross_entropy(
        x.float().transpose(1, 2), targets, reduction="none"
    )
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinite")])
def test_bad_logits_are_named_not_stored(value, word):
    good, bad = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    bad[0, 1, 2] = value
    targets = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(RunError, match=f"artefact gave {word}"):
        score.nll(bad, targets)
    with pytest.raises(RunError, match=f"artefact gave {word}"):
        score.pair(bad, good, targets)
    with pytest.raises(RunError, match=f"baseline gave {word}"):
        score.pair(good, bad, targets)


def test_unlike_vocabularies_are_not_compared():
    with pytest.raises(RunError, match="different vocabularies"):
        score.pair(torch.zeros(1, 1, 3), torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.long))
