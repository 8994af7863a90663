"""Our divergences and chunked loss beside those of TRL and Liger, where they are installed.

    pip install 'compresskit[distill-peers]'

They differ from us in two conventions, which the tests undo: a temperature divides logits, but its
square multiplies nothing; and Liger returns a mean over places.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import pytest
import torch
from torch import nn

from compresskit.distill.batch import Dense
from compresskit.distill.losses.chunked import Places, summed
from compresskit.distill.losses.terms import parse
from compresskit.hf.head import Head, Shape

COUNT, VOCABULARY, STUDENT, TEACHER = 13, 29, 8, 12
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def installed(name):
    return importlib.util.find_spec(name) is not None


needs_trl = pytest.mark.skipif(not installed("trl"), reason="TRL is not installed")
needs_liger = pytest.mark.skipif(not installed("liger_kernel"), reason="Liger is not installed")


def only(text):
    (term,) = parse(text)
    return term


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(1, COUNT, VOCABULARY, dtype=torch.float64, generator=generator)


def trl_loss(**options):
    with warnings.catch_warnings():  # about itself being experimental, and what it imports
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer

    labels = torch.zeros(1, COUNT, dtype=torch.long)
    return GKDTrainer.generalized_jsd_loss(logits(0), logits(1), labels, **options).item()


def our_loss(text):
    term = only(text)
    value = term.of(logits(0)[0].log_softmax(-1), logits(1)[0].log_softmax(-1)).mean()
    return value.item() / term.temperature**2


CASES = [
    ("forward_kl", {"beta": 0}),
    ("reverse_kl", {"beta": 1}),
    ("jsd:beta=0.5", {"beta": 0.5}),
    ("jsd:beta=0.1", {"beta": 0.1}),
    ("jsd:beta=0.9", {"beta": 0.9}),
    ("forward_kl:temperature=2", {"beta": 0, "temperature": 2.0}),
    ("reverse_kl:temperature=0.5", {"beta": 1, "temperature": 0.5}),
    ("jsd:beta=0.1,temperature=3", {"beta": 0.1, "temperature": 3.0}),
]


@needs_trl
@pytest.mark.parametrize(("text", "options"), CASES)
def test_trl_says_the_same(text, options):
    assert our_loss(text) == pytest.approx(trl_loss(**options), rel=1e-12)


@needs_trl
def test_trl_would_not_agree_with_a_wrong_loss():
    """Negative control: every case beside the loss with its sides swapped, or its square kept."""
    for text, options in CASES:
        beta = options["beta"]
        if beta != 0.5:
            assert abs(our_loss(text) / trl_loss(**{**options, "beta": 1 - beta}) - 1) > 1e-3
        if (temperature := options.get("temperature")) is not None:
            wrong = our_loss(text) * temperature**2
            assert abs(wrong / trl_loss(**options) - 1) > 0.5


def layers():
    torch.manual_seed(0)
    ours, theirs = (
        Head(nn.Linear(width, VOCABULARY), Shape()).double() for width in (STUDENT, TEACHER)
    )
    hidden, seen = (torch.randn(COUNT, width, dtype=torch.float64) for width in (STUDENT, TEACHER))
    return ours, theirs, hidden.requires_grad_(), seen, torch.randint(0, VOCABULARY, (COUNT,))


@needs_liger
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("ce:weight=0.5 + jsd:weight=0.5", {"beta": 0.5}),
        ("ce:weight=0.3 + jsd:beta=0.1,weight=0.7", {"beta": 0.1}),
        ("ce:weight=0.5 + forward_kl:weight=0.5", {"beta": 0.0}),
        ("ce:weight=0.5 + reverse_kl:weight=0.5", {"beta": 1.0}),
        ("ce:weight=0.5 + jsd:beta=0.9,temperature=2,weight=0.5", {"beta": 0.9}),
    ],
)
def test_ligers_chunked_loss_has_the_same_gradients(text, options):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    head, teacher, hidden, seen, labels = layers()
    hard, soft = parse(text)
    temperature = soft.temperature
    soft = soft.model_copy(update={"weight": soft.weight / temperature**2})
    keep = torch.ones(COUNT, dtype=torch.float64)
    keep[3] = 0.0
    where = keep.nonzero()[:, 0]
    places = Places(labels, keep, Dense(seen, teacher, {})).at(where)
    ours = summed(hidden[where], head, [hard, soft], places, chunk=5).total / len(where)
    peer = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard.weight,
        weight_soft_loss=parse(text)[1].weight,
        temperature=temperature,
        compiled=False,
        chunk_size=5,
        **options,
    )
    inputs = [hidden, head.linear.weight, head.linear.bias]
    found = torch.autograd.grad(ours, inputs)
    masked = torch.where(keep > 0, labels, -100)
    top, base = head.linear, teacher.linear
    theirs = peer(hidden, top.weight, seen, base.weight, masked, top.bias, base.bias)
    # Liger adds up in float32 and takes its hard loss in float32.
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-4, atol=1e-6)
    swapped = peer(
        seen[:, :STUDENT], top.weight, hidden.repeat(1, 2)[:, :TEACHER], base.weight, masked
    )
    assert abs(swapped.item() / ours.item() - 1) > 1e-2  # a wrong student would have been seen
