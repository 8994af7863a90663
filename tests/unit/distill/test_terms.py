"""Terms of a loss as typed, and which teacher each one needs."""

from __future__ import annotations

import pytest

from compresskit.distill.losses.terms import TERMS, check, parse, text_of
from compresskit.errors import SpecError, UnknownName

KINDS = (None, "dense", "topk", "draws")


def can(text):
    terms, able = parse(text), set()
    for kind in KINDS:
        try:
            check(terms, kind)
        except SpecError:
            continue
        able.add(kind)
    return able


def test_a_sum_as_typed():
    ce, jsd = parse("ce:weight=0.5 + jsd:beta=0.1,weight=0.5")
    assert (ce.name, ce.weight) == ("ce", 0.5)
    assert (jsd.name, jsd.weight, jsd.beta, jsd.temperature) == ("jsd", 0.5, 0.1, 1.0)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_reads_what_it_writes(name):
    terms = parse(f"{name}:weight=0.25")
    assert parse(text_of(terms)) == terms
    assert terms[0].name == name


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("ce", {None, "dense", "topk", "draws"}),
        ("forward_kl", {"dense", "topk", "draws"}),
        ("forward_kl:temperature=2", {"dense"}),
        ("forward_kl:tail=renormalised,temperature=2", {"topk"}),
        ("forward_kl:tail=none", {"topk"}),
        ("forward_kl:tail=none,temperature=2", set()),
        ("reverse_kl", {"dense", "topk"}),
        ("jsd", {"dense", "topk"}),
        ("skew_kl:temperature=2", {"dense"}),
        ("skew_reverse_kl", {"dense", "topk"}),
        ("tvd", {"dense", "topk"}),
        ("hidden", {"dense"}),
        ("ce + hidden", {"dense"}),
    ],
)
def test_which_teacher_a_term_needs(text, kinds):
    assert can(text) == kinds


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", SpecError, "names no term"),
        ("forwardkl", UnknownName, "Did you mean 'forward_kl'"),
        ("ce + ce:weight=2", SpecError, "ce stands there twice"),
        ("jsd:beta=0", SpecError, "greater than 0"),
        ("jsd:beta=1", SpecError, "less than 1"),
        ("tvd:temperature=2", SpecError, "unknown key 'temperature'"),
        ("ce:weight=0", SpecError, "greater than 0"),
        ("forward_kl:tail=zero", SpecError, "tail"),
        ("forward_kl:temperature", SpecError, "key=value"),
    ],
)
def test_what_is_refused(text, error, says):
    with pytest.raises(error, match=says):
        parse(text)


def test_a_refusal_names_term_rule_and_way_out():
    with pytest.raises(SpecError, match=r"--loss jsd: needs .* not drawn\. Use forward_kl or ce"):
        check(parse("ce + jsd"), "draws")
