"""What a metric is, and the ways to fold raw values into one reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compresskit.record import Estimated, Measured, Reading, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from compresskit.record import Record
    from compresskit.units import Unit

Better = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class Metric:
    """One named number of a record."""

    name: str
    unit: Unit
    better: Better
    definition: str
    """Formula id, then one sentence."""
    samples: Callable[[Record], list[float]]
    """Raw values, one per repetition (gaps: one per gap); empty where there are none."""
    value: Callable[[Record], Reading]
    stderr: Callable[[Record], float | None] = lambda record: None
    """Standard error of the value, where the record stores one."""
    first_turns: bool = False
    """The i-th value belongs to the i-th turn of its block, and there may be fewer than turns."""


def missing_from(record: Record, what: str) -> Unavailable:
    """Say why `record` has no number from the pass called `what`."""
    if record.status != "ok":
        return Unavailable(reason=f"{record.status}: {record.reason or 'no reason was stored'}")
    if record.simulated and what in ("latency", "throughput", "energy"):
        return Unavailable(
            reason=f"simulated: {', '.join(record.simulated)} has no speed of its own"
        )
    if what not in record.spec.protocol.passes:
        return Unavailable(reason=f"the {what} pass was not asked for")
    return Unavailable(reason=f"the {what} pass gave no such number")


def stored(
    name: str,
    unit: Unit,
    better: Better,
    definition: str,
    read: Callable[[Record], Reading],
    *,
    stderr: Callable[[Record], float | None] = lambda record: None,
) -> Metric:
    """Build a metric that the record holds as one number."""

    def samples(record: Record) -> list[float]:
        reading = read(record)
        return [] if isinstance(reading, Unavailable) else [reading.value]

    return Metric(name, unit, better, definition, samples, read, stderr)


def combine(
    readings: Iterable[Reading],
    fold: Callable[[Sequence[float]], float],
    *,
    unit: Unit,
    absent: Unavailable,
) -> Reading:
    """Fold readings of one kind into one; refuse to mix measured and estimated numbers.

    One unavailable part makes the whole unavailable: a sum or a peak without it would be a lower
    bound that looks like the value.
    """
    parts = list(readings)
    measured = [part for part in parts if isinstance(part, Measured)]
    estimated = [part for part in parts if isinstance(part, Estimated)]
    for part in parts:
        if isinstance(part, Unavailable):
            return part
    if measured and estimated:
        return Unavailable(reason="measured and estimated parts are not added up")
    if measured:
        return Measured(
            value=fold([part.value for part in measured]), unit=unit, source=measured[0].source
        )
    if estimated:
        return Estimated(
            value=fold([part.value for part in estimated]), unit=unit, model=estimated[0].model
        )
    return absent
