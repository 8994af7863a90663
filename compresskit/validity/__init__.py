"""The verdict on a record, judged from what the record itself stores.

    VALID      nothing speaks against the numbers
    WARN       usable, with a reservation that every table repeats
    INVALID    enters no comparison

Each rule is one small function from a record to findings, in the file of what it looks at
(`artefact`, `samples`, `machine`, `energy`); `RULES` lists them. A record that lacks the evidence a
rule needs is not judged by it. The verdict is computed again whenever a record is read, so a better
rule also reaches old records; `VERSION` tells which rules were in force when one was stored.

    1   length, times, samples, load, kernels, baseline
    2   zero durations, pace and contention of the machine, GPU telemetry, threads, cache hits, energy
    3   dense products of quantised layers, calibration text
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.record import Validity
from compresskit.validity import artefact, energy, machine, samples
from compresskit.validity.finding import FEWEST_SAMPLES, Finding, Series, series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.record import Record

__all__ = ["FEWEST_SAMPLES", "RULES", "VERSION", "Finding", "Series", "judge", "series"]

VERSION = 3

RULES: tuple[Callable[[Record], Iterator[Finding]], ...] = (
    artefact.finished,
    samples.fixed_length,
    samples.forward_time,
    samples.time_passes,
    artefact.real_speed,
    samples.enough_samples,
    samples.quiet_samples,
    samples.stationary,
    samples.warmed_up,
    samples.uncontended,
    machine.quiet_machine,
    machine.steady_pace,
    machine.unthrottled,
    machine.alone_on_gpu,
    machine.steady_gpu,
    machine.thread_count,
    artefact.kernels_engaged,
    artefact.packed_products,
    artefact.unseen_text,
    artefact.no_cache_hits,
    artefact.same_protocol,
    artefact.sound_baseline,
    artefact.own_warnings,
    energy.some_energy,
    energy.long_windows,
    energy.enough_windows,
    energy.agreeing_meters,
)


def judge(record: Record) -> Validity:
    """Return the verdict of all rules on `record`."""
    # One reason is given once, however many blocks or repetitions show it.
    findings = list(dict.fromkeys(finding for rule in RULES for finding in rule(record)))
    if any(finding.fatal for finding in findings):
        findings.sort(key=lambda finding: not finding.fatal)
        return _verdict("INVALID", findings)
    return _verdict("WARN" if findings else "VALID", findings)


def _verdict(verdict: str, findings: list[Finding]) -> Validity:
    return Validity.model_validate(
        {"rules": VERSION, "verdict": verdict, "reasons": tuple(map(str, findings))}
    )
