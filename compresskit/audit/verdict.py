"""From what was found to one word.

lossy          an identity is missed, a greedy token or a stop differs, something impossible was
               drawn, p < alpha², or p < alpha once and again on fresh draws
inconclusive   nothing of that, but it could have been there: too few draws, hardly a draft judged
lossless       nothing of that, and a bias of the size asked for would have been noticed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compresskit.audit.document import (
        Asked,
        GreedyCheck,
        RuleCheck,
        SampledCheck,
        StopCheck,
        Word,
    )

MET = 0.1
"""Share of the drawn answers that must have met a draft in their first tokens."""


def convincing(test: SampledCheck, asked: Asked, dtype: str) -> bool:
    """Whether these draws alone show a bias: p < alpha², or what the filters rule out.

    In half precision the last token that a filter lets through may be rounded in or out, so there the
    impossible is only told.
    """
    impossible = test.impossible > 0 and dtype == "float32"
    return impossible or (test.p is not None and test.p < asked.alpha**2)


def suspicious(test: SampledCheck, asked: Asked) -> bool:
    """Whether these draws look unlike the law."""
    return test.p is not None and test.p < asked.alpha


def verdict(
    rule: RuleCheck | None,
    greedy: GreedyCheck | None,
    stops: StopCheck | None,
    test: SampledCheck | None,
    again: SampledCheck | None,
    asked: Asked,
    dtype: str,
) -> tuple[Word, list[str]]:
    """The word and its reasons, the weightiest first."""
    lossy = [*_rule(rule), *_identity(greedy, stops), *_drawn(test, again, asked, dtype)]
    if lossy:
        return "lossy", lossy
    unclear = [*_idle(greedy), *_weak(test, asked)]
    if unclear:
        return "inconclusive", unclear
    return "lossless", list(_sound(greedy, test, again, asked))


def _rule(rule: RuleCheck | None) -> list[str]:
    if rule is None:
        return []
    errors = {
        "one token": rule.identity_error,
        "chains": rule.chain_error,
        "trees": rule.tree_error,
    }
    return [
        f"rule of acceptance, {name}: off by {error:.3g}, more than {rule.bound:g}"
        for name, error in errors.items()
        if error > rule.bound
    ]


def _identity(greedy: GreedyCheck | None, stops: StopCheck | None) -> list[str]:
    found = []
    bugs = [one for one in greedy.divergences if one.kind == "bug"] if greedy else []
    if bugs and greedy:
        first = bugs[0]
        found.append(
            f"greedy: {len(bugs)} of {greedy.prompts} answers differ; the first at token "
            f"{first.token} of prompt {first.prompt}, {first.gap:.3g} below the model's choice"
        )
    if stops and stops.wrong:
        found.append(f"stops: {stops.wrong[0]}")
    return found


def _drawn(
    test: SampledCheck | None, again: SampledCheck | None, asked: Asked, dtype: str
) -> list[str]:
    if test is None:
        return []
    if test.impossible and dtype == "float32":
        return [
            f"sampled: {test.impossible} of {test.draws} answers hold tokens that the filters rule out"
        ]
    if convincing(test, asked, dtype):
        return [_odd(test)]
    if again is not None and suspicious(again, asked):
        return [f"{_odd(again)}; {test.draws} draws before gave p {_p(test)}"]
    return []


def _odd(test: SampledCheck) -> str:
    return (
        f"sampled: chi-square {test.chi_square:.1f} on {test.degrees} degrees, p {_p(test)}, "
        f"total variation {test.total_variation:.3f} where {test.noise:.3f} is noise"
    )


def _p(test: SampledCheck) -> str:
    return "none" if test.p is None else f"{test.p:.2g}"


def _idle(greedy: GreedyCheck | None) -> list[str]:
    if greedy is not None and greedy.drafted == 0:
        return ["greedy: nothing was drafted, so nothing was tried. Use other or longer prompts."]
    return []


def _weak(test: SampledCheck | None, asked: Asked) -> list[str]:
    if test is None:
        return []
    if test.detectable is None:
        return [
            "sampled: all that was drawn falls into one cell: the model is certain on every prompt, or "
            "the draws are few. Raise the temperature, or draw more."
        ]
    found = []
    if test.detectable > asked.detect:
        found.append(
            f"sampled: {test.draws} draws notice a divergence of {test.detectable:.3g} "
            f"with {asked.power:.0%}, and {asked.detect:g} was asked for. Draw more."
        )
    if test.touched is not None and test.touched < MET * test.draws:
        found.append(
            f"sampled: {test.touched} of {test.draws} answers met a draft in their first tokens, "
            f"fewer than {MET:.0%}. Take more tokens together (--depth), or a drafter that drafts more."
        )
    return found


def _sound(
    greedy: GreedyCheck | None,
    test: SampledCheck | None,
    again: SampledCheck | None,
    asked: Asked,
) -> list[str]:
    found = []
    if greedy is not None:
        ties = len(greedy.divergences)
        tied = f", {ties} part at a numeric tie" if ties else ""
        found.append(f"greedy: {greedy.equal} of {greedy.prompts} answers equal{tied}")
    if test is not None:
        found.append(
            f"sampled: p {_p(again or test)}; a divergence of {test.detectable:.3g} would have been "
            f"noticed with {asked.power:.0%}"
        )
    if again is not None and test is not None:
        found.append(
            f"sampled: the first {test.draws} draws looked odd (p {_p(test)}), "
            f"{again.draws} fresh ones do not"
        )
    return found or ["nothing was found, and nothing but the rule was looked at"]
