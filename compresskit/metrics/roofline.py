"""How near a decode step is to what the machine can do, and which of its limits it would meet first.

A forward pass of the decoding has to read the weights that it multiplies with and the cache that
it attends to (`MemoryPass.moved_bytes`). With the limits of this very machine
(`compresskit doctor --measure`) three times can be modelled for it:

    memory    bytes moved / copy bandwidth
    compute   2 · parameters used · positions / matmul rate     positions = rows · (1 + drafted)
    launch    operations dispatched · time of dispatching one

`roofline_fraction` is the memory time over the measured time: 1 is the wall. The tag is the largest
of the three times; it is a statement about the model, not a measurement. Copying reads and writes,
so weights that fit into a cache can beat it: the fraction is then above 1 and says just that.

The roofline model: Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from compresskit.metrics.core import missing_from, stored
from compresskit.metrics.formulae import decode_s
from compresskit.metrics.speed import latency
from compresskit.record import Measured, Reading, Unavailable
from compresskit.stats import median
from compresskit.units import Unit

if TYPE_CHECKING:
    from compresskit.metrics.formulae import Timed
    from compresskit.record import Limits, MemoryPass, Record

MEASURE = "measure them with: compresskit doctor --measure"


@dataclass(frozen=True)
class Bound:
    """The three modelled times of one forward pass beside the measured one, in seconds."""

    seconds: float
    memory: float
    compute: float | None
    launch: float | None

    @property
    def tag(self) -> str:
        """Which limit the model meets first."""
        times = {"memory": self.memory, "compute": self.compute, "launch": self.launch}
        known = {name: value for name, value in times.items() if value is not None}
        return f"{max(known, key=lambda name: known[name])}-bound"

    @property
    def left_out(self) -> tuple[str, ...]:
        """What could not be modelled and might be the larger."""
        missing = []
        if self.compute is None:
            missing.append("compute (no matmul rate in the run's dtype)")
        if self.launch is None:
            missing.append("launches (operations per step were not counted)")
        return tuple(missing)


class _Step(NamedTuple):
    """One forward pass of the decoding, as measured."""

    memory: MemoryPass
    moved: int
    """Bytes."""
    seconds: float
    positions: float
    """Rows times tokens that were computed at once."""


def _step(record: Record) -> _Step | Unavailable:
    """Bring together what one forward pass moves and how long it takes, at the same batch."""
    passes = [block.passes.memory for block in record.blocks if block.passes.memory is not None]
    if not passes or record.status != "ok":
        return missing_from(record, "memory")
    # The last block's: what is moved does not vary.
    memory = passes[-1]
    if not memory.moved_bytes:
        return Unavailable(reason="the bytes that a step has to move were not counted")
    taken = [one for one in latency(record) if one.batch == memory.batch]
    seconds = [value for one in taken if (value := _forward_s(one)) is not None]
    if not seconds:
        return missing_from(record, "latency")
    drafted = sum(one.sample.drafted for one in taken)
    forwards = sum(one.sample.forwards - 1 for one in taken)
    return _Step(
        memory,
        moved=sum(memory.moved_bytes.values()),
        seconds=median(seconds),
        positions=memory.batch + drafted / forwards,
    )


def _forward_s(one: Timed) -> float | None:
    """Seconds per forward pass of the decoding; drafting is in it, the prefill is not."""
    span = decode_s(one)
    return None if span is None or one.sample.forwards < 2 else span / (one.sample.forwards - 1)


def bound(record: Record) -> Bound | Unavailable:
    """Model one forward pass of the decoding of `record`."""
    step = _step(record)
    if isinstance(step, Unavailable):
        return step
    limits, threads = record.limits, record.spec.protocol.threads
    placed = record.spec.engine.placement
    if placed is not None and placed.how == "tensor_parallel":
        return Unavailable(
            reason="the machine's limits are those of one device, and several read their shares at once"
        )
    if limits is None:
        return Unavailable(reason=f"the machine's limits are not known; {MEASURE}")
    if limits.threads is not None and limits.threads != threads:
        return Unavailable(
            reason=f"the machine's limits were measured with {limits.threads} CPU threads, the "
            f"run used {threads}; {MEASURE} --threads {threads}"
        )
    bandwidth = limits.copy_bytes_per_second
    if not isinstance(bandwidth, Measured):
        return Unavailable(reason=f"copy bandwidth: {_why(bandwidth)}")
    return Bound(
        seconds=step.seconds,
        memory=step.moved / bandwidth.value,
        compute=_compute_s(record, step, limits),
        launch=_launch_s(step, limits),
    )


def _why(reading: Reading) -> str:
    return reading.reason if isinstance(reading, Unavailable) else "estimated, not measured"


def _compute_s(record: Record, step: _Step, limits: Limits) -> float | None:
    """Seconds of the products alone: a multiplication and an addition per parameter and position.

    Parameters that are not read (an embedding that is only looked up, experts that stay idle) are
    taken off in proportion to their bytes.
    """
    rate, memory = limits.matmul_flops_per_second, step.memory
    if record.model is None or limits.dtype != record.model.dtype or not isinstance(rate, Measured):
        return None
    moved = memory.moved_bytes or {}
    read = step.moved - moved.get("cache", 0) - moved.get("cache_copy", 0)
    # A compiled graph may hold copies of the weights as constants beside them.
    held = sum(size for kind, size in memory.weights_bytes.items() if kind != "constants")
    share = min(1.0, read / held) if held else 1.0
    return 2 * memory.parameters * share * step.positions / rate.value


def _launch_s(step: _Step, limits: Limits) -> float | None:
    """Seconds of dispatching; a compiled graph has no such count."""
    operations, dispatch = step.memory.operations_per_step, limits.dispatch_seconds
    if not operations or not isinstance(dispatch, Measured):
        return None
    return operations * dispatch.value


def _fraction(record: Record) -> Reading:
    found = bound(record)
    if isinstance(found, Unavailable):
        return found
    return Measured(
        value=found.memory / found.seconds,
        unit=Unit.RATIO,
        source="bytes moved per forward pass over measured copy bandwidth and measured time",
    )


def _rate(record: Record) -> Reading:
    """Achieved rate of reading: needs no limits of the machine."""
    step = _step(record)
    if isinstance(step, Unavailable):
        return step
    return Measured(
        value=step.moved / step.seconds,
        unit=Unit.BYTE_PER_SECOND,
        source="bytes moved per forward pass over measured time",
    )


ROOFLINE = (
    stored(
        "roofline_fraction",
        Unit.RATIO,
        "higher",
        "roofline/1: moved_bytes / copy bandwidth / seconds per forward pass; the cache at its "
        "final length.",
        _fraction,
    ),
    stored(
        "moved_bytes_per_s",
        Unit.BYTE_PER_SECOND,
        "higher",
        "moved_rate/1: moved_bytes / seconds per forward pass.",
        _rate,
    ),
)
