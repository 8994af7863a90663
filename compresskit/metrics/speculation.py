"""Speculation: what was drafted, what of it was accepted, and where the time of a step went.

    ├── draft ──┤├──── verify ────┤├ judge ┤           step = draft + verify + host
                                                       judge is part of host
All from the latency pass, whose samples keep every step (`record.Sample.per_step_drafted`) and, where
the loop says where its parts begin and end, their seconds. Counts are totals over the repetitions.
What the numbers predict is in `metrics.speedup`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from compresskit.metrics.acceptance import acceptance, asked_length, verifications
from compresskit.metrics.core import Metric, missing_from, stored
from compresskit.metrics.energy import ENERGY
from compresskit.metrics.formulae import decode_s
from compresskit.metrics.speed import latency, ratio_of_totals
from compresskit.record import Estimated, Measured, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.metrics.acceptance import Acceptance
    from compresskit.metrics.formulae import Timed
    from compresskit.record import Reading, Record

PLACES = 3
"""Places of a draft whose rates are metrics; all of them are in `Acceptance`."""


def speculates(record: Record) -> bool:
    """Whether any token was drafted."""
    return any(one.sample.drafted for one in latency(record))


def missing_steps(record: Record) -> Unavailable:
    """Say why there is no number of the steps of a speculative loop."""
    taken = latency(record)
    if not taken or record.status != "ok":
        return missing_from(record, "latency")
    if not speculates(record):
        return Unavailable(reason="nothing was drafted")
    if all(one.sample.per_step_drafted is None for one in taken):
        return Unavailable(reason="measured before the single steps were kept; run it again")
    return Unavailable(reason="the loop does not tell the parts of its steps")


def of_record(record: Record) -> Acceptance | None:
    """The speculative steps of all repetitions; None where there are none."""
    found = acceptance(latency(record), asked_length(record))
    return found if found is not None and found.steps else None


def lossless(record: Record) -> tuple[str, str]:
    """What the rule of acceptance promises about the output, in a word, and why.

    exact: the tokens of plain decoding. distribution: tokens that are distributed like those. none: a
    rule that lets other tokens through. The promise is about the model as the rest of the stack left
    it, and about real arithmetic: rounding may flip a near tie.
    """
    if made_up := record.facts.get("synthetic"):
        return "none", f"the output is made up: {made_up}"
    for method in record.spec.stack:
        if method.params.get("accept", "exact") != "exact":
            return "none", f"{method.name} accepts by the rule {method.params['accept']!r}"
    if record.spec.sampling.temperature == 0:
        return "exact", "a draft stays while it is what the model says"
    return "distribution", "accepted and redrawn so that the model's distribution is left"


def _counted(
    name: str, unit: Unit, definition: str, count: Callable[[Timed], float | None]
) -> Metric:
    """Build a metric that is a total over the repetitions."""

    def samples(record: Record) -> list[float]:
        if not speculates(record):
            return []
        return [value for one in latency(record) if (value := count(one)) is not None]

    def value(record: Record) -> Reading:
        counts = samples(record)
        if not counts:
            return missing_steps(record)
        return Measured(value=sum(counts), unit=unit, source=f"total of {len(counts)}")

    return Metric(name, unit, "none", definition, samples, value)


def _steps(one: Timed) -> int | None:
    found = acceptance([one])
    return None if found is None else len(found.steps)


def _forwards(one: Timed) -> int | None:
    passes = verifications(one)
    return None if passes is None else sum(map(len, passes))


def _rate_at(kind: str, place: int) -> Metric:
    """Build the metric of one rate at one place, counted from 1."""
    read: dict[str, Callable[[Acceptance], list[float | None]]] = {
        "unconditional": lambda found: found.unconditional(),
        "offered": lambda found: found.offered(),
        "conditional": lambda found: found.conditional(),
    }
    under = {
        "unconditional": "steps that drafted anything",
        "offered": "steps that drafted one there",
        "conditional": "steps that drafted one there and accepted all before it",
    }

    def value(record: Record) -> Reading:
        found = of_record(record)
        if found is None:
            return missing_steps(record)
        rates = read[kind](found)
        rate = rates[place - 1] if place <= len(rates) else None
        if rate is None:
            return Unavailable(reason=f"no draft got as far as its token {place}")
        return Measured(value=rate, unit=Unit.RATIO, source=f"of {len(found.steps)} steps")

    name = f"{kind}_acceptance_at_{place}"
    text = f"{name}/1: steps that accepted the drafted token {place}, over {under[kind]}."
    return stored(name, Unit.RATIO, "higher", text, value)


def part_s(one: Timed, part: str) -> float:
    """Seconds that one repetition spent in a part of its decode steps; judging the prefill is none.

    0 where the loop does not tell; ask `has_parts` first.
    """
    spent = (one.sample.parts or {}).get(part, ())
    return sum(spent[1:] if part == "judge" else spent)


def has_parts(one: Timed) -> bool:
    """Whether the parts of the steps were timed, and something was drafted."""
    parts = one.sample.parts or {}
    return bool(one.sample.drafted and parts.get("draft") and parts.get("verify") and decode_s(one))


def host_s(one: Timed) -> float:
    """Seconds of decoding in neither the drafter nor the target."""
    return (decode_s(one) or 0.0) - part_s(one, "draft") - part_s(one, "verify")


def _per_step(name: str, definition: str, spent: Callable[[Timed], float]) -> Metric:
    return ratio_of_totals(
        name,
        Unit.SECOND,
        "lower",
        definition,
        lambda one: spent(one) if has_parts(one) else 0.0,
        lambda one: one.chunks - 1 if has_parts(one) else 0,
        missing=missing_steps,
    )


def _share(name: str, definition: str, spent: Callable[[Timed], float]) -> Metric:
    return ratio_of_totals(
        name,
        Unit.RATIO,
        "none",
        definition,
        lambda one: spent(one) if has_parts(one) else 0.0,
        lambda one: (decode_s(one) or 0.0) if has_parts(one) else 0.0,
        missing=missing_steps,
    )


def _drafter_bytes(record: Record) -> Reading:
    passes = [block.passes.memory for block in record.blocks if block.passes.memory is not None]
    if record.status != "ok" or not passes:
        return missing_from(record, "memory")
    held = passes[-1].drafter_bytes
    if held is None:
        return Unavailable(reason="there is no drafter, or it does not tell what it holds")
    return Measured(value=held, unit=Unit.BYTE, source="what the drafter says it holds")


def _j_per_accepted(record: Record) -> Reading:
    """Energy per delivered token over the accepted share of the delivered tokens."""
    energy = next(one for one in ENERGY if one.name == "j_per_output_token").value(record)
    if isinstance(energy, Unavailable):
        return energy
    taken = [one for one in latency(record) if one.sample.drafted]
    accepted = sum(one.sample.accepted for one in taken)
    if not accepted:
        return Unavailable(reason="nothing was accepted") if taken else missing_steps(record)
    value = energy.value * sum(one.batch * one.tokens for one in taken) / accepted
    how = "accepted share of the latency pass"
    if isinstance(energy, Estimated):
        return Estimated(value=value, unit=Unit.JOULE_PER_TOKEN, model=f"{energy.model}; {how}")
    return Measured(value=value, unit=Unit.JOULE_PER_TOKEN, source=f"{energy.source}; {how}")


SPECULATION: tuple[Metric, ...] = (
    _counted(
        "num_spec_steps",
        Unit.COUNT,
        "num_spec_steps/1: verifications of at least one drafted token, each row its own.",
        _steps,
    ),
    _counted(
        "num_verify_forwards",
        Unit.COUNT,
        "num_verify_forwards/1: passes after the prefill, each row its own; with none drafted too.",
        _forwards,
    ),
    _counted(
        "num_draft_tokens",
        Unit.TOKEN,
        "num_draft_tokens/1: tokens drafted, all rows together.",
        lambda one: one.sample.drafted,
    ),
    _counted(
        "num_accepted_draft_tokens",
        Unit.TOKEN,
        "num_accepted_draft_tokens/1: drafted tokens that were delivered, all rows together.",
        lambda one: one.sample.accepted,
    ),
    ratio_of_totals(
        "draft_acceptance_rate",
        Unit.RATIO,
        "higher",
        "acceptance_rate/1: accepted / drafted.",
        lambda one: one.sample.accepted,
        lambda one: one.sample.drafted,
        missing=missing_steps,
    ),
    ratio_of_totals(
        "mean_acceptance_length",
        Unit.RATIO,
        "higher",
        "acceptance_length/2: 1 + accepted / num_spec_steps: the model's own token counts, steps "
        "without a draft do not.",
        lambda one: (_steps(one) or 0) + one.sample.accepted,
        lambda one: _steps(one) or 0,
        missing=missing_steps,
    ),
    *(
        _rate_at(kind, place)
        for kind in ("unconditional", "offered", "conditional")
        for place in range(1, PLACES + 1)
    ),
    _per_step("draft_s", "draft_s/1: seconds of drafting per step.", partial(part_s, part="draft")),
    _per_step(
        "verify_s",
        "verify_s/1: seconds of the target's pass per step.",
        partial(part_s, part="verify"),
    ),
    _per_step(
        "judge_s",
        "judge_s/1: seconds of comparing and drawing tokens per step; part of host_s.",
        partial(part_s, part="judge"),
    ),
    _per_step("host_s", "host_s/1: step less draft_s and verify_s.", host_s),
    _share("draft_share", "draft_share/1: draft_s / step.", partial(part_s, part="draft")),
    _share("verify_share", "verify_share/1: verify_s / step.", partial(part_s, part="verify")),
    _share("host_share", "host_share/1: host_s / step.", host_s),
    stored(
        "drafter_bytes",
        Unit.BYTE,
        "lower",
        "drafter_bytes/1: tables, texts and cache of the drafter at the end of a request; no weights.",
        _drafter_bytes,
    ),
    stored(
        "j_per_accepted_token",
        Unit.JOULE_PER_TOKEN,
        "lower",
        "j_accepted/1: j_per_output_token / (accepted / delivered tokens of the latency pass).",
        _j_per_accepted,
    ),
)
