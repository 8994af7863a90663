"""Time, joules and peaks: only on one machine, and only where big enough and significant.

Records of one interleaved session are compared turn by turn. Records of two sessions go over a
bridge (`bridge`): net of waiting, and with the machine's own pace added to the factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit.compare.bridge import shares
from compresskit.compare.outcome import Outcome
from compresskit.metrics import METRICS, decode_at, main_batch, speed
from compresskit.metrics.pairs import side_by_side
from compresskit.metrics.windows import metered, provenance
from compresskit.record import Measured, Unavailable
from compresskit.stats import FACTOR, Interval, judge as judge_samples, median

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.compare.line import Check, Judge
    from compresskit.compare.outcome import Word
    from compresskit.compare.two import Two
    from compresskit.metrics import Metric, Timed
    from compresskit.metrics.windows import Kind
    from compresskit.record import Record

    Repetitions = Callable[[Record], list[Timed]]


class Values(NamedTuple):
    """Samples of both sides, and how they may be compared."""

    base: list[float]
    new: list[float]
    factor: float
    """Practical factor; more than this is a difference that matters."""
    pace: float = 1.0
    """How much slower the machine itself was in the new session."""
    paired: bool = False


def timed(repetitions: Repetitions) -> Judge:
    """Compare the metric of the check's name, whose values come from these repetitions."""

    def judge(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
        return _timed(METRICS[check.name], repetitions, check, two, tolerance)

    return judge


def larger_batches(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """The decode rate of the largest batch, beside the headline of the first one."""
    largest = max(two.new.spec.workload.batch_sizes)
    if largest == main_batch(two.new):
        return None
    return _timed(
        decode_at(largest), lambda one: speed.throughput(one, largest), check, two, tolerance
    )


def _timed(
    metric: Metric, repetitions: Repetitions, check: Check, two: Two, tolerance: float | None
) -> Outcome | None:
    base, new = metric.samples(two.base), metric.samples(two.new)
    if not base and not new:
        return None
    if two.paired:
        sides = side_by_side(metric, two.base, two.new)
        if sides.one:
            return _verdict(check, Values(sides.one, sides.other, tolerance or FACTOR, paired=True))
    if isinstance(two.bridge, str):
        return _silent(check, metric, two, two.bridge)
    if not base or not new:
        return _silent(check, metric, two, f"the {'new' if base else 'base'} record has no samples")
    base = _net(metric, base, two.base, repetitions(two.base))
    new = _net(metric, new, two.new, repetitions(two.new))
    return _verdict(
        check, Values(base, new, tolerance or check.tolerance or FACTOR, pace=two.bridge.pace)
    )


def _net(
    metric: Metric, values: list[float], record: Record, repetitions: list[Timed]
) -> list[float]:
    """Values net of waiting: times shrink by it, rates grow; joules belong to no repetition."""
    if len(values) != len(repetitions):
        return values
    working = shares(record, repetitions)
    if metric.better == "higher":
        return [value / share for value, share in zip(values, working, strict=True)]
    return [value * share for value, share in zip(values, working, strict=True)]


def _silent(check: Check, metric: Metric, two: Two, reason: str) -> Outcome:
    """Show both values and say why they are not compared."""
    values = [
        reading.value if isinstance(reading := metric.value(one), Measured) else None
        for one in (two.base, two.new)
    ]
    base, new = values
    return Outcome(
        check.tier,
        check.name,
        "not compared",
        check.unit,
        base,
        new,
        reason=reason,
        look=check.look,
    )


def _verdict(check: Check, values: Values) -> Outcome:
    before, after = median(values.base), median(values.new)
    slower = (after > before) == (check.better == "lower")
    # A machine that was slower excuses a slower run, one that was faster a faster run.
    pace = values.pace if slower else 1 / values.pace
    factor = values.factor * max(1.0, pace)
    found = judge_samples(
        values.base,
        values.new,
        lower_is_better=check.better == "lower",
        paired=values.paired,
        factor=factor,
    )
    reason = found.reason
    if not values.paired and not 0.95 < values.pace < 1.05:
        paced = f"the machine itself took {values.pace:.2f} times as long"
        reason = f"{reason}; {paced}" if reason else paced
    return Outcome(
        tier=check.tier,
        metric=check.name,
        word=found.word,
        unit=check.unit,
        base=before,
        new=after,
        ratio=found.ratio,
        tolerance=factor,
        p=found.p,
        n_base=found.n_base,
        n_new=found.n_new,
        reason=reason,
        look=check.look,
    )


def joules(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """Compare gross joules per token, window by window, within one provenance, scope and device."""
    kind: Kind = "prefill" if "prefill" in check.name else "generate"
    if "energy" not in two.new.spec.protocol.passes:
        return None
    before, after = _sources(two.base, kind), _sources(two.new, kind)
    for side, found in (("base", before), ("new", after)):
        if isinstance(found, str):
            return _silent(check, METRICS[check.name], two, f"{side}: {found}")
    for name, one, other in zip(_SOURCES, before, after, strict=True):
        if one != other:
            reason = f"{name} differs: base {one}, new {other}"
            return _silent(check, METRICS[check.name], two, reason)
    return _timed(METRICS[check.name], lambda one: [], check, two, tolerance)


_SOURCES = ("provenance of energy", "counter", "scope of energy", "metered device")


def _sources(record: Record, kind: Kind) -> list[str] | str:
    """Where the joules of a record come from, in the order of `_SOURCES`; or why there are none."""
    found = metered(record, kind)
    if isinstance(found, Unavailable):
        return found.reason
    kinds = {provenance(one.window.reading) for one in found}
    if "estimated" in kinds:
        return "estimated joules are not compared"
    counters = {r.source for one in found if isinstance(r := one.window.reading, Measured)}
    scopes = {str(one.window.scope) for one in found}
    devices = {device for one in found for device in one.window.devices}
    return [" and ".join(sorted(names)) for names in (kinds, counters, scopes, devices)]


def peak(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """A peak is the largest of many marks and not a sample: a factor is all that is asked."""
    before, after = (METRICS[check.name].value(one) for one in (two.base, two.new))
    if not isinstance(before, Measured) or not isinstance(after, Measured):
        return None
    if before.value <= 0:
        return None
    ratio, factor = after.value / before.value, tolerance or check.tolerance or FACTOR
    word: Word = "worse" if ratio > factor else "better" if ratio < 1 / factor else "same"
    return Outcome(
        tier=check.tier,
        metric=check.name,
        word=word,
        unit=check.unit,
        base=before.value,
        new=after.value,
        ratio=Interval(ratio, ratio, ratio),
        tolerance=factor,
        n_base=1,
        n_new=1,
        look=check.look,
    )
