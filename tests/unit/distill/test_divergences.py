"""Divergences: figures computed elsewhere, identities, limits, and what a top-k or draws leave of them.

The figures were computed outside this package in float64 from the logits TEACHER and STUDENT; the
divergences among them by TRL 1.16.0 (`generalized_jsd_loss`), which tests/oracles/test_distill_peers.py
asks again where it is installed.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from compresskit.distill.batch import Draws, TopK
from compresskit.distill.losses import divergences, sparse
from compresskit.distill.losses.chunked import Places, values
from compresskit.distill.losses.terms import parse

TEACHER = torch.tensor([[3.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
STUDENT = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
P, Q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)

GOLDEN = {
    "forward_kl": 2.456938187,
    "reverse_kl": 2.080140531,
    "jsd:beta=0.5": 0.423390295,
    "jsd:beta=0.1": 0.184434047,
    "jsd:beta=0.9": 0.168195607,
    "tvd": 0.800164333,
    "forward_kl:temperature=2": 2.844311565,
    "skew_kl:alpha=0.1": 1.464476882,
    "skew_reverse_kl:alpha=0.1": 1.401827009,
}
TOP_TWO = {
    "forward_kl": 2.447253024,
    "forward_kl:tail=none": 2.640039664,
    "forward_kl:tail=renormalised": 0.828724910,
}
DIVERGENCES = tuple(text for text in GOLDEN if "temperature" not in text)


def only(text):
    (term,) = parse(text)
    return term


def top(logprobs, count):
    found = logprobs.topk(count, dim=-1)
    # As 1 - sum, a small rest would be off by more than the inequalities below allow.
    rest = logprobs.scatter(-1, found.indices, -torch.inf).logsumexp(-1)
    return TopK(found.indices, found.values, rest)


def random_pairs(count=64, size=9, spread=3.0):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(count, size, dtype=torch.float64, generator=generator) * spread  # noqa: E731
    return draw().log_softmax(-1), draw().log_softmax(-1)


def near(value):
    return pytest.approx(value, abs=6e-10)


@pytest.mark.parametrize("text", GOLDEN)
def test_figures_computed_elsewhere(text):
    assert only(text).of(Q, P).item() == near(GOLDEN[text])


def test_a_student_in_the_teachers_place_gives_other_figures():
    """Negative control: had the two been swapped, the figures would have told."""
    wrong = [text for text in GOLDEN if only(text).of(P, Q).item() != near(GOLDEN[text])]
    assert wrong == [text for text in GOLDEN if text not in ("tvd", "jsd:beta=0.5")]


def test_the_temperature_is_squared_and_would_be_missed():
    cold = [divergences.cooled(side, 2.0) for side in (Q, P)]
    plain = divergences.forward_kl(*cold).item()
    assert plain == near(0.711077891)
    assert plain != near(GOLDEN["forward_kl:temperature=2"])


@pytest.mark.parametrize("text", TOP_TWO)
def test_figures_of_a_top_two(text):
    assert only(text).of(Q, top(P, 2)).item() == near(TOP_TWO[text])


def test_cross_entropy_is_divergence_and_entropy():
    """The teacher's whole distribution as draws: weights are its probabilities."""
    whole = Draws(torch.arange(4)[None], P.exp())
    value = sparse.cross_entropy(Q, whole).item()
    assert value == near(3.129016572)
    assert value - only("forward_kl").of(Q, P).item() == near(0.672078385)


def test_cross_entropy_of_labels():
    places = Places(torch.tensor([0]), torch.ones(1), None)
    (value,) = values(STUDENT, parse("ce"), places)
    assert value.item() == near(-Q[0, 0].item())


def test_jsd_has_no_kl_at_its_ends():
    """Divided by its share it has; itself it goes to 0."""
    small, large = divergences.jsd(Q, P, 0.001), divergences.jsd(Q, P, 0.999)
    assert (small / 0.001).item() == pytest.approx(2.447213, abs=6e-7)
    assert (large / 0.001).item() == pytest.approx(2.074790, abs=6e-7)
    assert small.item() < 0.003 < GOLDEN["forward_kl"]


def test_places_are_not_averaged():
    """The trap of `batchmean` with a batch of one row: three places would count once."""
    three = only("forward_kl").of(Q.expand(3, 4), P.expand(3, 4))
    assert three.shape == (3,)
    assert three.sum().item() == pytest.approx(7.370814560, abs=2e-9)


@pytest.mark.parametrize("text", DIVERGENCES)
def test_never_below_zero_and_zero_for_equals(text):
    student, teacher = random_pairs()
    term = only(text)
    assert (term.of(student, teacher) > 1e-3).all()
    assert term.of(teacher, teacher).abs().max() < 1e-12


@pytest.mark.parametrize("text", DIVERGENCES)
def test_a_top_k_of_everything_is_everything(text):
    student, teacher = random_pairs()
    term = only(text)
    torch.testing.assert_close(
        term.of(student, top(teacher, 9)), term.of(student, teacher), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("text", DIVERGENCES)
@pytest.mark.parametrize("count", [1, 4, 8])
def test_merging_the_tail_never_adds(text, count):
    student, teacher = random_pairs()
    term = only(text)
    merged, whole = term.of(student, top(teacher, count)), term.of(student, teacher)
    assert (merged <= whole + 1e-12).all()
    # Of tails with one token nothing is lost.
    assert torch.allclose(merged, whole) == (count == 8)


def test_leaving_the_tail_out_is_no_divergence():
    """Negative control of the one above, both ways."""
    student, teacher = random_pairs()
    loose = only("forward_kl:tail=none").of(student, top(teacher, 4))
    whole = only("forward_kl").of(student, teacher)
    assert (loose > whole + 1e-3).any()
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    keen = torch.tensor([[0.6, 0.39, 0.005, 0.005]]).log()
    assert only("forward_kl:tail=none").of(keen, top(teacher, 2)).item() < -0.2
    assert only("forward_kl").of(keen, top(teacher, 2)).item() > 0.5


def test_a_nearly_sure_student_keeps_its_tail():
    """1 - sum would be 0 in float32, and its logarithm infinite."""
    logits = torch.tensor([[30.0, 0.0, 0.0, 1.0]])
    sure = logits.log_softmax(-1).requires_grad_()
    target = TopK(torch.tensor([[0]]), torch.tensor([[-0.1]]), torch.tensor([-2.3522]))
    pair = sparse.bucketed(sure, target)
    assert pair.student[0, 1].item() == pytest.approx(math.log(2 + math.e) - 30, abs=1e-5)
    only("forward_kl").of(sure, target).sum().backward()
    assert sure.grad is not None and sure.grad.isfinite().all()


@pytest.mark.parametrize("text", DIVERGENCES)
def test_what_both_rule_out_adds_nothing(text):
    """A masked vocabulary: logits of -inf on both sides, with a gradient that is a number."""
    off = torch.full((1, 2), -torch.inf, dtype=torch.float64)
    logits = torch.cat((STUDENT, off), 1).requires_grad_()
    value = only(text).of(logits.log_softmax(-1), torch.cat((TEACHER, off), 1).log_softmax(-1))
    assert value.item() == near(GOLDEN[text])
    value.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_draws_are_right_on_average(count):
    """Every possible outcome of drawing `count` tokens, times its chance: exact, nothing sampled."""
    value, slope = 0.0, torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=count):
        chance = math.exp(sum(P[0, token].item() for token in drawn))
        logits = STUDENT.clone().requires_grad_()
        target = Draws(torch.tensor([drawn]), torch.full((1, count), 1 / count, dtype=P.dtype))
        loss = only("forward_kl").of(logits.log_softmax(-1), target).sum()
        loss.backward()
        value += chance * loss.item()
        slope += chance * logits.grad[0]
    assert value == pytest.approx(3.129016572, abs=1e-9)
    exact = STUDENT.clone().requires_grad_()
    only("forward_kl").of(exact.log_softmax(-1), P).sum().backward()
    torch.testing.assert_close(slope, exact.grad[0], rtol=0, atol=1e-12)


def test_a_top_k_is_wrong_on_average():
    """Negative control: what draws get right, the usual top-k target does not."""
    slopes = []
    for text, target in (("forward_kl", P), ("forward_kl:tail=renormalised", top(P, 2))):
        logits = STUDENT.clone().requires_grad_()
        only(text).of(logits.log_softmax(-1), target).sum().backward()
        slopes.append(logits.grad[0])
    assert (slopes[0] - slopes[1]).abs().max() > 0.1
