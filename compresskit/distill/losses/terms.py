"""The terms of a loss, as typed behind `--loss`: names, parameters, and which teacher each one needs.

    forward_kl                            ce:weight=0.5 + jsd:beta=0.1,weight=0.5
    forward_kl:temperature=2              forward_kl + hidden:at=every,weight=0.1

                      whole distribution   top-k                     draws
    ce                yes                  yes                       yes      (asks no teacher)
    forward_kl        yes                  at temperature 1, or      at temperature 1, up to the
                                           tail=renormalised         teacher's entropy
    tvd               yes                  yes                       no
    other divergences yes                  at temperature 1          no
    hidden            yes                  no                        no

A temperature divides the logits of both sides and multiplies the divergence by its square, so that
the gradient keeps its size (Hinton et al. 2015, arXiv 1503.02531). TRL and Liger divide, and do not
multiply.

To add a divergence: one function in `divergences`, one final class in `divergence_terms`, its name in
`TERMS`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from compresskit.distill.batch import Dense, TopK
from compresskit.distill.losses.divergence_terms import (
    JSD,
    TVD,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from compresskit.distill.losses.term import OPTION, CrossEntropy, Hidden, Kind, Term
from compresskit.errors import SpecError, UnknownName
from compresskit.spec import parse_sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compresskit.distill.batch import Target

TERMS: Mapping[str, type[Term]] = MappingProxyType(
    {
        term.name: term
        for term in (
            CrossEntropy,
            ForwardKL,
            ReverseKL,
            JSD,
            SkewKL,
            SkewReverseKL,
            TVD,
            Hidden,
        )
    }
)


def parse(text: str) -> tuple[Term, ...]:
    """Read a sum of terms.

    Raises:
        SpecError: nothing is asked for, a parameter is wrong, or a term stands there twice.
        UnknownName: there is no such term.
    """
    found: dict[str, Term] = {}
    for name, params in parse_sum(text, option=OPTION):
        if name not in TERMS:
            raise UnknownName(f"term of {OPTION}", name, TERMS)
        if name in found:
            raise SpecError(f"{OPTION} {text!r}: {name} stands there twice. Give it one weight.")
        found[name] = TERMS[name].decode(params, where=f"{OPTION} {name}")
    if not found:
        raise SpecError(f"{OPTION} {text!r}: names no term. Known: {', '.join(TERMS)}.")
    return tuple(found.values())


def text_of(terms: Iterable[Term]) -> str:
    """What `parse` reads as the same terms, every parameter spelled out."""
    return " + ".join(term.text() for term in terms)


def kind_of(target: Target | None) -> Kind | None:
    """The form of a target; None where there is no teacher."""
    if isinstance(target, Dense):
        return "dense"
    if isinstance(target, TopK):
        return "topk"
    return None if target is None else "draws"


def check(terms: Iterable[Term], kind: Kind | None) -> None:
    """Make sure that every term can be had from such a target, before anything is trained.

    Raises:
        SpecError: one cannot; says which, why, and what can be done.
    """
    for term in terms:
        if reason := term.missing(kind):
            raise SpecError(f"{OPTION} {term.name}: {reason}.")
