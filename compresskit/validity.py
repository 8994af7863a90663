"""The verdict on a record, judged from what the record itself stores.

    VALID      nothing speaks against the numbers
    WARN       usable, with a reservation that every table repeats
    INVALID    enters no comparison

Each rule is one small function from a record to findings; `RULES` lists them. The verdict is
computed again whenever a record is read, so a better rule also reaches old records; `VERSION`
tells which rules were in force when a verdict was stored.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from compresskit.record import Validity
from compresskit.stats import coefficient_of_variation, median

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.record import Block, Record, Sample

VERSION = 1

FEWEST_SAMPLES = 3
"""An interval from two values is no interval."""
HIGHEST_CV = 0.20
"""Above this a run is unstable; under 5 % it is quiet."""
LARGEST_DRIFT = 0.10
"""Allowed change of the median from the first third of the repetitions to the last."""


class Finding(NamedTuple):
    """Something that speaks against a record."""

    fatal: bool
    code: str
    detail: str

    def __str__(self) -> str:
        """The reason as stored: a code to count by, then a sentence."""
        return f"{self.code}: {self.detail}"


class Series(NamedTuple):
    """The repetitions of one speed pass of one block."""

    name: str
    new_tokens: int
    warmups: tuple[Sample, ...]
    samples: tuple[Sample, ...]

    def seconds(self) -> list[float]:
        """Time per forward pass, per repetition.

        Speculation needs more passes for one prompt than for another; that is no unrest.
        """
        return [
            sample.arrivals[-1].seconds / max(1, sample.forwards)
            for sample in self.samples
            if sample.arrivals
        ]


def series(record: Record) -> Iterator[Series]:
    """Speed passes of all blocks that were run."""
    for block in record.blocks:
        yield from _of_block(block)


def _of_block(block: Block) -> Iterator[Series]:
    one = block.passes.latency
    if one is not None:
        yield Series("latency pass", one.new_tokens, one.warmups, one.samples)
    for many in block.passes.throughput or ():
        if many.samples:
            name = f"throughput pass at batch {many.batch}"
            yield Series(name, many.new_tokens, many.warmups, many.samples)


def finished(record: Record) -> Iterator[Finding]:
    """A run that was skipped or failed has no numbers to compare."""
    if record.status != "ok":
        yield Finding(True, record.status, record.reason or "no reason was stored")


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


def real_speed(record: Record) -> Iterator[Finding]:
    """A simulated saving has a quality, but no speed."""
    if record.simulated and any(one.samples for one in series(record)):
        names = ", ".join(record.simulated)
        yield Finding(True, "simulated_speed", f"{names} is simulated: its speed means nothing")


def enough_samples(record: Record) -> Iterator[Finding]:
    """Count repetitions over all blocks: a repeat of the run adds a block."""
    totals: dict[str, int] = {}
    for one in series(record):
        totals[one.name] = totals.get(one.name, 0) + len(one.samples)
    for name, count in totals.items():
        if count < FEWEST_SAMPLES:
            detail = f"{count} repetitions in the {name}, fewer than {FEWEST_SAMPLES}"
            yield Finding(False, "too_few_samples", detail)


def steady(record: Record) -> Iterator[Finding]:
    """Repetitions of the same work take the same time, from the first to the last."""
    for one in series(record):
        times = one.seconds()
        spread = coefficient_of_variation(times) if len(times) >= FEWEST_SAMPLES else None
        if spread is not None and spread > HIGHEST_CV:
            detail = f"the {one.name} varies by {spread:.0%} (more than {HIGHEST_CV:.0%})"
            yield Finding(False, "high_cv", detail)
        # At least two repetitions a side: one alone is an outlier as often as a trend.
        third = max(2, len(times) // 3)
        if len(times) < 2 * third:
            continue
        first, last = median(times[:third]), median(times[-third:])
        if first > 0 and abs(last / first - 1) > LARGEST_DRIFT:
            detail = f"the {one.name} changed by {last / first - 1:+.0%} from start to end"
            yield Finding(False, "not_stationary", detail)


def warmed_up(record: Record) -> Iterator[Finding]:
    """The first repetition pays for allocation, caches and compilation."""
    for one in series(record):
        if one.samples and not one.warmups:
            yield Finding(False, "no_warmup", f"the {one.name} ran without a warm-up")


def quiet_machine(record: Record) -> Iterator[Finding]:
    """More runnable threads than CPUs means that others took part of the time."""
    cpus = None if record.environment is None else record.environment.cpu_count
    loads = [block.load_average[0] for block in record.blocks if block.load_average is not None]
    if cpus and loads and max(loads) > cpus:
        yield Finding(False, "machine_loaded", f"load average {max(loads):.1f} on {cpus} CPUs")


def kernels_engaged(record: Record) -> Iterator[Finding]:
    """A run on a GPU that fell back to reference code measures the reference code.

    On the CPU the reference is the product, unless the method promised more: `promised_kernels`
    in the facts lists the operations for which it did.
    """
    promised = record.facts.get("promised_kernels")
    names = set(map(str, promised)) if isinstance(promised, list) else set()
    gpu = record.device is not None and record.device.kind == "cuda"
    for operation, implementation in sorted(record.kernels.items()):
        if implementation.startswith("reference") and (gpu or operation in names):
            yield Finding(False, "kernel_not_engaged", f"{operation} ran as {implementation}")
    for operation in sorted(names - set(record.kernels)):
        yield Finding(False, "kernel_not_engaged", f"{operation} was promised and did not run")


def same_protocol(record: Record) -> Iterator[Finding]:
    """Distances belong to the dense run of this very spec."""
    fidelity = None if record.quality is None else record.quality.fidelity
    if fidelity is None:
        return
    dense = {spec.digest() for spec in record.spec.best_dense()}
    if fidelity.baseline_digest not in dense:
        detail = (
            f"distances were taken from {fidelity.baseline_digest}, not from this spec's baseline"
        )
        yield Finding(False, "protocol_mismatch", detail)


def sound_baseline(record: Record) -> Iterator[Finding]:
    """Random weights prove mechanics, never quality."""
    kind = None if record.model is None else record.model.baseline
    if kind == "random" and record.quality is not None:
        yield Finding(False, "random_weights", "quality of random weights says nothing")


def own_warnings(record: Record) -> Iterator[Finding]:
    """What the method or the loader wanted said: `warnings` in the facts, a list of sentences."""
    warnings = record.facts.get("warnings")
    for warning in warnings if isinstance(warnings, list) else ():
        yield Finding(False, "warning", str(warning))


RULES: tuple[Callable[[Record], Iterator[Finding]], ...] = (
    finished,
    fixed_length,
    forward_time,
    real_speed,
    enough_samples,
    steady,
    warmed_up,
    quiet_machine,
    kernels_engaged,
    same_protocol,
    sound_baseline,
    own_warnings,
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
