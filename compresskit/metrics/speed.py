"""Speed: what arrival times of the latency and throughput passes say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.core import Better, Metric, missing_from
from compresskit.metrics.formulae import (
    Timed,
    decode_rate,
    decode_rate_of_batch,
    e2e_s,
    gaps_s,
    prefill_rate,
    step_s,
    tpot_s,
    ttft_s,
)
from compresskit.record import Measured, Reading, Unavailable
from compresskit.stats import median
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.record import Record


def latency(record: Record) -> list[Timed]:
    """Repetitions of the latency pass, all blocks together."""
    return [
        Timed(sample, probe.batch, sample.prompt_tokens or probe.prompt_tokens)
        for block in record.blocks
        if (probe := block.passes.latency) is not None
        for sample in probe.samples
    ]


def throughput(record: Record, batch: int) -> list[Timed]:
    """Repetitions of the throughput pass at one batch size, all blocks together."""
    return [
        Timed(sample, probe.batch, sample.prompt_tokens or probe.prompt_tokens)
        for block in record.blocks
        for probe in block.passes.throughput or ()
        if probe.batch == batch
        for sample in probe.samples
    ]


def main_batch(record: Record) -> int:
    """The batch size of the headline rates: the first of the workload."""
    return record.spec.workload.batch_sizes[0]


def headline(record: Record) -> list[Timed]:
    """Repetitions behind the headline rates.

    The throughput pass lets the device run ahead, so it is preferred; the latency pass stands in
    only where the spec asked for no throughput pass, which is then also true of the baseline.
    """
    if "throughput" in record.spec.protocol.passes:
        return throughput(record, main_batch(record))
    return latency(record)


def missing_throughput(record: Record, batch: int) -> Unavailable:
    for block in record.blocks:
        for probe in block.passes.throughput or ():
            if probe.batch == batch and probe.reason:
                return Unavailable(reason=f"batch {batch}: {probe.reason}")
    return missing_from(record, "throughput")


def missing_headline(record: Record) -> Unavailable:
    if "throughput" in record.spec.protocol.passes:
        return missing_throughput(record, main_batch(record))
    return missing_from(record, "latency")


def per_repetition(
    name: str,
    unit: Unit,
    better: Better,
    definition: str,
    formula: Callable[[Timed], float | None],
    *,
    source: Callable[[Record], list[Timed]] = latency,
    missing: Callable[[Record], Unavailable] = lambda record: missing_from(record, "latency"),
) -> Metric:
    """Build a metric whose value is the median over repetitions."""

    def samples(record: Record) -> list[float]:
        return [value for one in source(record) if (value := formula(one)) is not None]

    def value(record: Record) -> Reading:
        values = samples(record)
        if not values:
            return missing(record)
        return Measured(value=median(values), unit=unit, source=f"median of {len(values)}")

    return Metric(name, unit, better, definition, samples, value)


def ratio_of_totals(
    name: str,
    unit: Unit,
    better: Better,
    definition: str,
    over: Callable[[Timed], float],
    under: Callable[[Timed], float],
    *,
    source: Callable[[Record], list[Timed]] = latency,
    missing: Callable[[Record], Unavailable] = lambda record: missing_from(record, "latency"),
) -> Metric:
    """Build a metric whose value is a ratio of sums: a mean of ratios would favour short runs."""

    def samples(record: Record) -> list[float]:
        return [over(one) / under(one) for one in source(record) if one.chunks and under(one) > 0]

    def value(record: Record) -> Reading:
        ones = [one for one in source(record) if one.chunks]
        total = sum(map(under, ones))
        if total <= 0:
            return missing(record)
        return Measured(
            value=sum(map(over, ones)) / total, unit=unit, source=f"ratio of totals of {len(ones)}"
        )

    return Metric(name, unit, better, definition, samples, value)


def decode_at(batch: int) -> Metric:
    """The batch decode rate of the throughput pass at one batch size."""
    return per_repetition(
        f"decode_tokens_per_s_batch_{batch}",
        Unit.TOKEN_PER_SECOND,
        "higher",
        f"decode_rate_batch/1: b (n - 1) / (tn - t1) at batch {batch}, all rows together.",
        decode_rate_of_batch,
        source=lambda record: throughput(record, batch),
        missing=lambda record: missing_throughput(record, batch),
    )


def _itl() -> Metric:
    def samples(record: Record) -> list[float]:
        return [gap for one in latency(record) for gap in gaps_s(one)]

    def value(record: Record) -> Reading:
        values = samples(record)
        if not values:
            return missing_from(record, "latency")
        source = f"median of {len(values)} gaps"
        return Measured(value=median(values), unit=Unit.SECOND, source=source)

    text = "itl/1: gaps between chunks of all repetitions, pooled; never holds the first token."
    return Metric("itl_s", Unit.SECOND, "lower", text, samples, value)


SPEED = (
    per_repetition("ttft_s", Unit.SECOND, "lower", "ttft/1: t1 - t0.", ttft_s),
    per_repetition("e2e_s", Unit.SECOND, "lower", "e2e/1: tn - t0.", e2e_s),
    per_repetition(
        "tpot_s",
        Unit.SECOND,
        "lower",
        "tpot/1: (tn - t1) / (n - 1) per request; none with a single token.",
        tpot_s,
    ),
    _itl(),
    per_repetition(
        "step_s", Unit.SECOND, "lower", "step/1: (tn - t1) / (c - 1), one decode step.", step_s
    ),
    ratio_of_totals(
        "tokens_per_step",
        Unit.RATIO,
        "higher",
        "tokens_per_step/1: (n - 1) / (c - 1); 1 without speculation.",
        lambda one: one.tokens - 1,
        lambda one: one.chunks - 1,
    ),
    per_repetition(
        "prefill_tokens_per_s",
        Unit.TOKEN_PER_SECOND,
        "higher",
        "prefill_rate/1: b P / ttft.",
        prefill_rate,
    ),
    per_repetition(
        "decode_tokens_per_s_per_seq",
        Unit.TOKEN_PER_SECOND,
        "higher",
        "decode_rate_seq/1: (n - 1) / (tn - t1) of one row, latency pass.",
        decode_rate,
    ),
    per_repetition(
        "decode_tokens_per_s",
        Unit.TOKEN_PER_SECOND,
        "higher",
        "decode_rate_batch/1: b (n - 1) / (tn - t1), all rows of the first batch size together.",
        decode_rate_of_batch,
        source=headline,
        missing=missing_headline,
    ),
    ratio_of_totals(
        "output_tokens_per_s",
        Unit.TOKEN_PER_SECOND,
        "higher",
        "output_rate/1: sum of b n over sum of e2e, prefill included, all rows together.",
        lambda one: one.batch * one.tokens,
        lambda one: one.last,
        source=headline,
        missing=missing_headline,
    ),
    ratio_of_totals(
        "forwards_per_token",
        Unit.RATIO,
        "lower",
        "forwards_per_token/1: forward passes of the target model over n, prefill included.",
        lambda one: one.sample.forwards,
        lambda one: one.tokens,
    ),
)
