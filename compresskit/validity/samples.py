"""Rules about the repetitions: their length, their times, their number, their unrest."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from compresskit.stats import coefficient_of_variation
from compresskit.validity.finding import FEWEST_SAMPLES, LARGEST_DRIFT, Finding, change, series

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.record import Record
    from compresskit.validity.finding import Series

HIGHEST_CV = 0.20
"""Above this a run is unstable; under 5 % it is quiet."""
MOST_WAITING = 0.05
"""Share of the measured time that the process may have waited for a CPU."""
HEAVY_WAITING = 0.30


def fixed_length(record: Record) -> Iterator[Finding]:
    """Speed is only comparable at the output length that was asked for."""
    asked = record.spec.workload.new_tokens
    for one in series(record):
        if one.new_tokens != asked:
            detail = f"the {one.name} ran for {one.new_tokens} tokens, the workload asks {asked}"
            yield Finding(True, "osl_mismatch", detail)
            continue
        delivered = {sum(arrival.tokens for arrival in sample.arrivals) for sample in one.samples}
        for wrong in sorted(delivered - {asked}):
            detail = f"the {one.name} delivered {wrong} tokens per row instead of {asked}"
            yield Finding(True, "osl_mismatch", detail)


def forward_time(record: Record) -> Iterator[Finding]:
    """Tokens arrive after the request and in order."""
    for one in series(record):
        for sample in one.samples:
            times = [0.0, *(arrival.seconds for arrival in sample.arrivals)]
            if any(after < before for before, after in pairwise(times)):
                detail = f"arrival times of the {one.name} run backwards"
                yield Finding(True, "clock_not_monotonic", detail)
                break


def time_passes(record: Record) -> Iterator[Finding]:
    """Nothing takes no time: neither the first token, nor all the others, nor loading."""
    for one in series(record):
        for sample in one.samples:
            times = [arrival.seconds for arrival in sample.arrivals]
            if times and (times[0] <= 0 or (len(times) > 1 and times[-1] == times[0])):
                yield Finding(True, "zero_duration", f"tokens of the {one.name} arrived in no time")
                break
    setup = record.setup
    for name, seconds in (
        ()
        if setup is None
        else (
            ("loading", setup.load_seconds),
            ("compressing", setup.apply_seconds),
            ("compiling", setup.compile_seconds or 0.0),
        )
    ):
        if seconds < 0:
            yield Finding(True, "negative_duration", f"{name} took {seconds:.3g} s")


def enough_samples(record: Record) -> Iterator[Finding]:
    """Count repetitions over all blocks: a repeat of the run adds a block."""
    totals: dict[str, int] = {}
    for one in series(record):
        totals[one.name] = totals.get(one.name, 0) + len(one.samples)
    for name, count in totals.items():
        if count < FEWEST_SAMPLES:
            detail = f"{count} repetitions in the {name}, fewer than {FEWEST_SAMPLES}"
            yield Finding(False, "too_few_samples", detail)


def quiet_samples(record: Record) -> Iterator[Finding]:
    """Repetitions of the same work take the same time."""
    for one in series(record):
        times = one.seconds()
        spread = coefficient_of_variation(times) if len(times) >= FEWEST_SAMPLES else None
        if spread is not None and spread > HIGHEST_CV:
            detail = f"the {one.name} varies by {spread:.0%} (more than {HIGHEST_CV:.0%})"
            yield Finding(False, "high_cv", detail)


def stationary(record: Record) -> Iterator[Finding]:
    """The last repetitions take the time of the first.

    Where the machine itself became slower or faster by as much, as the yardstick beside each turn
    tells, `machine_drift` says so, and the artefact is not blamed.
    """
    for one in series(record):
        trend = change(one.seconds())
        if trend is None or abs(trend) <= LARGEST_DRIFT or _explained(one):
            continue
        detail = f"the {one.name} changed by {trend:+.0%} from start to end"
        yield Finding(False, "not_stationary", detail)


def _explained(one: Series) -> bool:
    times = one.seconds()
    if len(times) != len(one.paces):
        return False
    machine = change(one.paces)
    rest = change([time / pace for time, pace in zip(times, one.paces, strict=True)])
    moved = machine is not None and abs(machine) > LARGEST_DRIFT
    return moved and rest is not None and abs(rest) <= LARGEST_DRIFT


def warmed_up(record: Record) -> Iterator[Finding]:
    """The first repetition pays for allocation, caches and compilation."""
    for one in series(record):
        if one.samples and not one.warmups:
            yield Finding(False, "no_warmup", f"the {one.name} ran without a warm-up")


def uncontended(record: Record) -> Iterator[Finding]:
    """Time in which others had the CPU is not the artefact's.

    Never INVALID, however much it was: sides of an interleaved session suffer alike, and a busy
    machine must not turn a comparison into a refusal.
    """
    for one in series(record):
        counted = [
            (sample.waited, sample.arrivals[-1].seconds)
            for sample in one.samples
            if sample.waited is not None and sample.arrivals
        ]
        whole = sum(seconds for _, seconds in counted)
        share = sum(waited for waited, _ in counted) / whole if whole > 0 else 0.0
        if share > MOST_WAITING:
            detail = f"the {one.name} waited {share:.0%} of its time for a CPU that others had"
            if share > HEAVY_WAITING:
                detail += ": its absolute times tell as much about the others"
            yield Finding(False, "contended", detail)
