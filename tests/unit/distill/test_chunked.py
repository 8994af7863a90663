"""The chunked loss: its sum and gradient are those of the plain one, with no whole matrix of logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from compresskit.distill.batch import Dense
from compresskit.distill.losses import chunked
from compresskit.distill.losses.chunked import Places, summed, values
from compresskit.distill.losses.layer import Plain, Whole, layer_of
from compresskit.distill.losses.terms import check, parse
from compresskit.errors import Conflict, RunError, SpecError
from compresskit.hf.head import Head, Shape
from compresskit.measure.memory.activations import LiveTensors

TEXTS = (
    "ce",
    "forward_kl",
    "forward_kl:temperature=2",
    "forward_kl:tail=none",
    "forward_kl:tail=renormalised,temperature=2",
    "reverse_kl",
    "reverse_kl:temperature=0.5",
    "jsd:beta=0.1",
    "jsd:beta=0.7,temperature=3",
    "skew_kl",
    "skew_kl:alpha=0",
    "skew_reverse_kl:alpha=0.3",
    "tvd",
    "ce:weight=0.5 + forward_kl:weight=2",
)
KINDS = ("dense", "topk", "draws")


def possible(text, kind):
    try:
        check(parse(text), kind)
    except SpecError:
        return False
    return True


PAIRS = [(text, kind) for text in TEXTS for kind in KINDS if possible(text, kind)]


def plain(room, terms, places):
    """All logits at once, differentiated by autograd."""
    each = values(room.head(room.hidden), terms, places)
    return sum(
        term.weight * (one * places.weights).sum() for term, one in zip(terms, each, strict=True)
    )


def gradients(room, total):
    return torch.autograd.grad(total, [room.hidden, *room.head.parameters()])


@pytest.mark.parametrize(("text", "kind"), PAIRS)
def test_equals_the_plain_loss(make_room, text, kind):
    room, terms = make_room(), parse(text)
    places = room.with_target(kind)
    ours = summed(room.hidden, room.head, terms, places, chunk=3)
    theirs = plain(room, terms, places)
    torch.testing.assert_close(ours.total, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(room, ours.total), gradients(room, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("text", "kind"), PAIRS)
def test_equals_finite_differences(make_room, text, kind):
    room, terms = make_room(), parse(text)
    places = room.with_target(kind)
    total = summed(room.hidden, room.head, terms, places, chunk=3).total
    found = gradients(room, total)
    generator = torch.Generator().manual_seed(2)
    for tensor, gradient in zip([room.hidden, *room.head.parameters()], found, strict=True):
        way = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
        step, at = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(way, alpha=sign * step)
                at.append(summed(room.hidden, room.head, terms, places, chunk=3).total)
                tensor.sub_(way, alpha=sign * step)
        slope = (at[0] - at[1]) / (2 * step)
        torch.testing.assert_close((way * gradient).sum(), slope, rtol=1e-6, atol=1e-7)


def test_a_wrong_loss_would_be_seen(make_room):
    """Negative control: a temperature that is not squared, and student and teacher swapped."""
    room, (right,) = make_room(), parse("forward_kl:temperature=2")
    total = summed(room.hidden, room.head, [right], room.places, chunk=3).total
    good = gradients(room, total)
    (swapped,) = parse("reverse_kl:temperature=2")
    for term, factor in ((right, 0.25), (swapped, 1.0)):
        student = room.head(room.hidden).log_softmax(-1)
        loss = (term.of(student, room.teacher_logprobs()) * room.places.weights).sum() * factor
        assert not torch.allclose(loss, total, rtol=1e-3)
        assert not torch.allclose(gradients(room, loss)[0], good[0], rtol=1e-3)


@pytest.mark.parametrize("shape", [Shape(), Shape(scale=0.5), Shape(cap=2.0), Shape(3.0, 1.5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", [Plain, Whole])
def test_both_ways_through_a_head(make_room, shape, bias, way):
    """A hook on the layer forbids the written-out products; the gradients are the same."""
    room, terms = make_room(bias=bias, shape=shape), parse("ce + jsd")
    if way is Whole:
        room.head.linear.register_forward_hook(lambda *_: None)
    assert type(layer_of(room.head, room.hidden)) is way
    ours = summed(room.hidden, room.head, terms, room.places, chunk=2).total
    theirs = plain(room, terms, room.places)
    for one, other in zip(gradients(room, ours), gradients(room, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 7, 100, None])
def test_the_chunk_does_not_matter(make_room, chunk):
    room, terms = make_room(), parse("ce + forward_kl")
    ours = summed(room.hidden, room.head, terms, room.places, chunk=chunk)
    whole = plain(room, terms, room.places)
    torch.testing.assert_close(ours.total, whole, rtol=1e-12, atol=1e-12)


def test_parts_are_sums_without_their_weights(make_room):
    room = make_room()
    terms = parse("ce:weight=0.5 + forward_kl:weight=2")
    sums = summed(room.hidden, room.head, terms, room.places, chunk=2)
    assert not sums.parts.requires_grad
    torch.testing.assert_close(sums.total, 0.5 * sums.parts[0] + 2 * sums.parts[1])
    alone = summed(room.hidden, room.head, parse("ce"), room.places).total
    torch.testing.assert_close(sums.parts[0], alone.detach())


def test_an_embedding_shared_with_the_head_gets_both_gradients(make_room):
    room, terms = make_room(bias=False), parse("ce + forward_kl")
    tokens = torch.arange(7)
    found = []
    for loss in (
        lambda hidden: summed(hidden, room.head, terms, room.places, chunk=2).total,
        lambda hidden: sum(
            (one * room.places.weights).sum()
            for one in values(room.head(hidden), terms, room.places)
        ),
    ):
        weight = room.head.linear.weight
        weight.grad = None
        loss(functional.embedding(tokens, weight).tanh()).backward()
        found.append(weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", ["head", "bias", "hidden"])
def test_what_is_frozen_stays_without_gradient(make_room, frozen):
    room, terms = make_room(), parse("forward_kl")
    layer = room.head.linear
    for parameter in {"head": layer.parameters(), "bias": [layer.bias], "hidden": []}[frozen]:
        parameter.requires_grad_(False)
    hidden = room.hidden.detach().requires_grad_(frozen != "hidden")
    summed(hidden, room.head, terms, room.places, chunk=2).total.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (layer.weight.grad is None) == (frozen == "head")
    assert (layer.bias.grad is None) == (frozen in ("head", "bias"))


def test_no_places_give_nothing_and_a_gradient_of_zero(make_room):
    """A batch of which nothing counts still takes part in every collective of a wrapped module."""
    room, terms = make_room(), parse("ce + forward_kl")
    none = torch.zeros(0, dtype=torch.long)
    total = summed(room.hidden[none], room.head, terms, room.places.at(none)).total
    assert total.item() == 0
    total.backward()
    assert not room.head.linear.weight.grad.any() and not room.hidden.grad.any()


def test_without_a_gradient_none_is_formed(make_room, monkeypatch):
    room, terms = make_room(), parse("ce + forward_kl")
    expected = summed(room.hidden, room.head, terms, room.places, chunk=2).total
    monkeypatch.setattr(Plain, "slide", None)
    with torch.no_grad():
        total = summed(room.hidden, room.head, terms, room.places, chunk=2).total
    assert total.item() == expected.item() and not total.requires_grad


def test_the_gradient_is_handed_out_once(make_room):
    room = make_room()
    total = summed(room.hidden, room.head, parse("ce"), room.places).total
    total.backward(retain_graph=True)
    with pytest.raises(RunError, match="handed out once"):
        total.backward()


def test_a_factor_behind_the_sum_reaches_the_gradient(make_room):
    room = make_room()
    found = [
        gradients(room, summed(room.hidden, room.head, parse("ce"), room.places).total * factor)
        for factor in (1.0, 0.125)
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one / 8, other)


def test_bfloat16_products_with_sums_in_float32(make_room):
    """As close to float64 as the plain loss under autocast is, give or take a half."""
    room, terms = make_room(), parse("ce + reverse_kl")
    exact = gradients(room, plain(room, terms, room.places))
    hidden = room.hidden.detach().float().requires_grad_()
    head = room.head.float()
    dense = room.places.target
    places = Places(
        room.places.labels,
        room.places.weights.float(),
        Dense(dense.hidden.float(), dense.head.float(), {}),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = summed(hidden, head, terms, places, chunk=2).total
        each = values(head(hidden), terms, places)
        assert each[0].dtype == ours.dtype == torch.float32
        theirs = sum((one * places.weights).sum() for one in each)
    inputs = [hidden, *head.parameters()]
    found = [torch.autograd.grad(total, inputs) for total in (ours, theirs)]
    for one, other, right in zip(*found, exact, strict=True):
        assert one.dtype == torch.float32
        off, usual = ((side.double() - right).norm() / right.norm() for side in (one, other))
        assert 0 < off < 1.5 * usual < 0.05


def test_vocabularies_of_two_sizes_are_refused(make_room):
    room = make_room()
    small = Head(nn.Linear(4, 9), Shape()).double()
    with pytest.raises(Conflict, match="9 tokens apart and its teacher 11"):
        summed(room.hidden, small, parse("forward_kl"), room.places)
    labels = room.places.labels % 9
    places = Places(labels, room.places.weights, room.places.target)
    assert summed(room.hidden, small, parse("ce"), places).total.isfinite()


def test_no_matrix_of_logits_is_ever_whole():
    """Counted, not timed: the most bytes that are alive at a time, beside the plain loss."""
    count, vocabulary, width = 256, 4096, 8
    torch.manual_seed(0)
    head, teacher = (Head(nn.Linear(width, vocabulary, bias=False), Shape()) for _ in range(2))
    hidden = torch.randn(count, width, requires_grad=True)
    labels, weights = torch.randint(0, vocabulary, (count,)), torch.ones(count)
    places = Places(labels, weights, Dense(torch.randn(count, width), teacher, {}))
    terms = parse("ce + forward_kl")
    peaks = []
    for loss in (
        lambda: summed(hidden, head, terms, places, chunk=16).total,
        lambda: sum(one.sum() for one in values(head(hidden), terms, places)),
    ):
        with LiveTensors() as live:
            loss().backward()
        peaks.append(live.peak)
    logits = 4 * count * vocabulary
    assert peaks[0] < logits < peaks[1] / 3
    assert chunked.chunk_of(49152) * 49152 * 4 <= chunked.CHUNK_BYTES
