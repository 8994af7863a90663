"""What a cache keeps of a distribution: bytes, bias, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compresskit.distill.teachers.cache.draws import DrawsFormat
from compresskit.distill.teachers.cache.parse import parse
from compresskit.distill.teachers.cache.topk import TopKFormat

VOCABULARY = 512


def test_tokens_that_the_teacher_rules_out_cost_nothing() -> None:
    logprobs = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    for form in (TopKFormat(k=2), TopKFormat(k=3), TopKFormat(k=4), DrawsFormat(n=8)):
        stored = form.pack(logprobs, torch.rand(1, form.uniforms(), dtype=torch.float64))
        errors = form.errors(logprobs, stored)
        assert all(value.isfinite().all() for value in errors.values())
        if isinstance(form, TopKFormat):
            assert errors["kl"].item() == pytest.approx(0, abs=1e-6)


PROBS = torch.tensor([0.55, 0.25, 0.1, 0.06, 0.03, 0.01])
SIGMAS = 5.0
"""Over the checks here, a sound estimator fails one in 10,000 times, were it not seeded."""


def estimates(form: DrawsFormat, f: torch.Tensor, places: int) -> torch.Tensor:
    """float64 `[places]`: what draws of the same distribution make of the expectation of `f`."""
    logprobs = PROBS.log().expand(places, -1)
    uniforms = torch.rand(
        places, form.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    back = form.unpack(form.pack(logprobs, uniforms))
    return (back.weights.double() * f.double()[back.ids]).sum(-1)


def too_far(found: torch.Tensor, truth: float) -> bool:
    return bool((found.mean() - truth).abs() > SIGMAS * found.std() / len(found) ** 0.5)


@pytest.mark.parametrize("form", ["draws:n=12", "draws:n=3,power=0.7", "draws:n=5,power=1.2"])
def test_draws_are_unbiased_for_every_token(form: str) -> None:
    """Any f is a sum of indicators, so one test a token covers all of them: the mean of 20,000 places
    lies within five standard errors of the probability itself, which is the exact answer."""
    chosen = parse(form)
    assert isinstance(chosen, DrawsFormat)
    for token, probability in enumerate(PROBS.tolist()):
        found = estimates(chosen, torch.eye(len(PROBS))[token], 20_000)
        assert found.std() > 0
        assert not too_far(found, probability)


def test_a_top_k_that_forgets_the_rest_fails_the_test_of_draws() -> None:
    """The biased control: top-3, brought back to a sum of one, on the same distribution."""
    back = TopKFormat(k=3, store="float32").unpack(
        TopKFormat(k=3, store="float32").pack(PROBS.log()[None], torch.empty(1, 0))
    )
    weights = back.logprobs.double().softmax(-1)
    for token, probability in enumerate(PROBS.tolist()):
        estimate = (weights * (back.ids == token)).sum().expand(20_000)
        assert too_far(estimate, probability)


def test_the_expected_weight_is_exact_by_enumeration() -> None:
    """Two draws of three tokens: all nine outcomes with their probabilities, no chance involved."""
    probs = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for power in (1.0, 0.5):
        form = DrawsFormat(n=2, power=power)
        proposal = (probs**power) / (probs**power).sum()
        middles = proposal.cumsum(0) - proposal / 2
        mean = torch.zeros(3, dtype=torch.float64)
        for first in range(3):
            for second in range(3):
                uniforms = torch.stack((middles[first], middles[second]))[None]
                back = form.unpack(form.pack(probs.log().float()[None], uniforms))
                chance = proposal[first] * proposal[second]
                mean.scatter_add_(0, back.ids[0], chance * back.weights[0].double())
        torch.testing.assert_close(mean, probs, rtol=1e-6, atol=0)


def test_the_smoothed_kl_is_that_of_the_written_out_distribution(
    rows: torch.Tensor, dense_logprobs: Any
) -> None:
    """Against numpy: a draw more, spread evenly. Unused entries must not count as token 0."""
    logprobs = dense_logprobs(rows[:2]).float()
    uniforms = torch.rand(
        len(logprobs), 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for form in (DrawsFormat(n=9), DrawsFormat(n=9, power=0.6)):
        stored = form.pack(logprobs, uniforms)
        back, found = form.unpack(stored), form.errors(logprobs, stored)["smoothed_kl"]
        assert (back.weights == 0).any()
        for place, exact in enumerate(logprobs.double().numpy()):
            given = np.full(VOCABULARY, 1 / VOCABULARY)
            weights = back.weights[place].double().numpy()
            np.add.at(given, back.ids[place].numpy(), 9 * weights / weights.sum())
            given /= 10
            kl = (np.exp(exact) * (exact - np.log(given))).sum()
            assert found[place].item() == pytest.approx(kl, rel=1e-5)


def test_a_token_drawn_twice_stands_once() -> None:
    uniforms = torch.tensor([[0.1, 0.7, 0.2, 0.3]], dtype=torch.float64)
    back = DrawsFormat(n=4).unpack(DrawsFormat(n=4).pack(PROBS.log()[None], uniforms))
    assert back.ids.tolist() == [[0, 1, 0, 0]]
    assert back.weights.tolist() == [[0.75, 0.25, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("form", "vocabulary", "expected"),
    [
        ("topk:k=64", 49_152, 64 * (2 + 2) + 2),  # 256 bytes and the rest
        ("topk:k=64", 65_536, 258),
        ("topk:k=64", 65_537, 64 * (4 + 2) + 2),
        ("topk:k=64,store=float32", 49_152, 64 * (2 + 4) + 4),
        ("draws:n=12", 49_152, 12 * (2 + 1)),
        ("draws:n=12", 151_936, 12 * (4 + 1)),
        ("draws:n=12,power=0.8", 49_152, 12 * (2 + 4)),
    ],
)
def test_bytes_of_a_place(form: str, vocabulary: int, expected: int) -> None:
    chosen = parse(form)
    assert chosen.bytes_per_place(vocabulary) == expected
    # And that is what packing gives, at every width.
    logprobs = torch.randn(2, vocabulary).log_softmax(-1)
    stored = chosen.pack(logprobs, torch.rand(2, chosen.uniforms(), dtype=torch.float64))
    assert sum(tensor.nbytes for tensor in stored.values()) == 2 * expected


def test_wide_ids_come_back() -> None:
    """The last token of a vocabulary beyond 16 bits."""
    logprobs = torch.full((1, 70_000), -20.0)
    logprobs[0, -1] = 0.0
    for form in (TopKFormat(k=2), DrawsFormat(n=3)):
        found = form.unpack(form.pack(logprobs.log_softmax(-1), torch.full((1, 3), 0.5).double()))
        assert found.ids[0, 0] == 69_999
