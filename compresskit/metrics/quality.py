"""Quality: the likelihood of a text, and the distance from the baseline's predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.core import Better, Metric, missing_from, stored
from compresskit.record import Measured, Reading, Unavailable
from compresskit.stats import median
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.record import Fidelity, GreedyComparison, Likelihood, Record


IS_BASELINE = "the dense model is what the others are compared with"
"""Reason why a dense run has no distance from the baseline."""


def _quality_missing(record: Record, part: str) -> Unavailable:
    if record.status != "ok" or "quality" not in record.spec.protocol.passes:
        return missing_from(record, "quality")
    if part != "likelihood" and not record.spec.stack:
        return Unavailable(reason=IS_BASELINE)
    notes = "; ".join(record.quality.notes) if record.quality else ""
    reason = f"the quality pass gave no {part}"
    return Unavailable(reason=f"{reason} ({notes})" if notes else reason)


def _likelihood(
    name: str, unit: Unit, definition: str, pick: Callable[[Likelihood], float]
) -> Metric:
    def read(record: Record) -> Reading:
        found = record.quality.likelihood if record.quality else None
        if found is None:
            return _quality_missing(record, "likelihood")
        return Measured(value=pick(found), unit=unit, source=found.protocol_id)

    def stderr(record: Record) -> float | None:
        found = record.quality.likelihood if record.quality else None
        return found.nll_stderr if found is not None and name == "nll_nats" else None

    return stored(name, unit, "lower", definition, read, stderr=stderr)


def _fidelity(
    name: str,
    unit: Unit,
    better: Better,
    definition: str,
    pick: Callable[[Fidelity], float],
    spread: Callable[[Fidelity], float | None],
) -> Metric:
    def read(record: Record) -> Reading:
        found = record.quality.fidelity if record.quality else None
        if found is None:
            return _quality_missing(record, "comparison with the baseline")
        return Measured(value=pick(found), unit=unit, source=found.protocol_id)

    def stderr(record: Record) -> float | None:
        found = record.quality.fidelity if record.quality else None
        return None if found is None else spread(found)

    return stored(name, unit, better, definition, read, stderr=stderr)


def _greedy(
    name: str, unit: Unit, definition: str, pick: Callable[[GreedyComparison], float | None]
) -> Metric:
    def read(record: Record) -> Reading:
        found = record.quality.greedy if record.quality else None
        value = None if found is None else pick(found)
        if value is None:
            return _quality_missing(record, "greedy comparison")
        return Measured(value=value, unit=unit, source="greedy continuations")

    return stored(name, unit, "higher", definition, read)


def _divergence(found: GreedyComparison) -> float | None:
    if not found.first_divergence:
        return None
    # An identical continuation diverges at its end at the earliest: the median stands as long as
    # fewer than half of the prompts are censored like this, and is a lower bound otherwise.
    return median([found.max_new_tokens if i is None else i for i in found.first_divergence])


QUALITY = (
    _likelihood(
        "nll_nats",
        Unit.NAT,
        "nll/1: mean negative log-likelihood per scored token.",
        lambda found: found.nll_mean,
    ),
    _likelihood(
        "perplexity",
        Unit.RATIO,
        "perplexity/1: exp of the mean negative log-likelihood per token.",
        lambda found: found.perplexity,
    ),
    _likelihood(
        "bits_per_byte",
        Unit.BIT_PER_BYTE,
        "bits_per_byte/1: negative log2-likelihood of the text over its UTF-8 bytes.",
        lambda found: found.bits_per_byte,
    ),
    _fidelity(
        "kl_mean_nats",
        Unit.NAT,
        "lower",
        "kl/1: mean KL(baseline || artefact) per token, same tokens.",
        lambda found: found.kl.mean,
        lambda found: found.kl.stderr,
    ),
    _fidelity(
        "top1_agreement",
        Unit.RATIO,
        "higher",
        "top1/1: share of tokens for which both prefer the same next token.",
        lambda found: found.top1_agreement,
        lambda found: found.top1_stderr,
    ),
    _fidelity(
        "delta_nll_nats",
        Unit.NAT,
        "lower",
        "delta_nll/1: mean NLL of the artefact minus that of the baseline, paired by window.",
        lambda found: found.delta_nll,
        lambda found: found.delta_nll_stderr,
    ),
    _greedy(
        "greedy_exact_match",
        Unit.RATIO,
        "exact_match/1: share of prompts with a greedy continuation identical to the baseline's.",
        lambda found: found.exact_match if found.prompts else None,
    ),
    _greedy(
        "first_divergence_tokens",
        Unit.TOKEN,
        "first_divergence/1: median index of the first token that differs from the baseline's; "
        "an identical continuation counts its full budget.",
        _divergence,
    ),
)
