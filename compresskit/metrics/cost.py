"""Cost: bytes held, seconds of setting up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.core import Metric, combine, missing_from, stored
from compresskit.record import Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.record import MemoryPass, Record, Setup


def _memory(record: Record) -> list[MemoryPass]:
    return [block.passes.memory for block in record.blocks if block.passes.memory is not None]


def _from_memory(
    name: str, unit: Unit, definition: str, formula: Callable[[MemoryPass], float | None]
) -> Metric:
    """Build a metric over the bytes that were weighed: the last block's, as they do not vary."""

    def samples(record: Record) -> list[float]:
        return [value for one in _memory(record) if (value := formula(one)) is not None]

    def value(record: Record) -> Reading:
        values = samples(record)
        if not values:
            return missing_from(record, "memory")
        return Measured(value=values[-1], unit=unit, source="storage bytes")

    return Metric(name, unit, "lower", definition, samples, value)


def _weights(one: MemoryPass) -> float | None:
    return float(sum(one.weights_bytes.values())) if one.weights_bytes else None


def _cache_per_token(one: MemoryPass) -> float | None:
    slots = one.batch * one.tokens_in_cache
    return sum(one.cache_bytes.values()) / slots if slots else None


def _bits_per_parameter(one: MemoryPass) -> float | None:
    held = _weights(one)
    return None if held is None or not one.parameters else 8 * held / one.parameters


_SETUP_PHASES = frozenset({"load", "compress"})


def _peak(record: Record) -> Reading:
    """Highest mark of the device's counter over the windows in which the artefact is used.

    Loading and compressing have peaks of their own, which say nothing about use.
    """
    counter = "rss" if record.device is None or record.device.kind == "cpu" else "cuda_allocated"
    readings: list[Reading] = []
    for one in _memory(record):
        for name, phase in one.phases.items():
            if name not in _SETUP_PHASES and counter in phase.peaks:
                readings.append(phase.peaks[counter])
    return combine(readings, max, unit=Unit.BYTE, absent=missing_from(record, "memory"))


def _setup(record: Record, pick: Callable[[Setup], float | None]) -> Reading:
    value = None if record.setup is None else pick(record.setup)
    if value is None:
        if record.status != "ok":
            return missing_from(record, "setup")
        return Unavailable(reason="no such step in this run")
    return Measured(value=value, unit=Unit.SECOND, source="perf_counter")


COST = (
    _from_memory(
        "weights_bytes",
        Unit.BYTE,
        "weights_bytes/1: bytes held by all weights, scales and embeddings included.",
        _weights,
    ),
    _from_memory(
        "kv_bytes_per_token",
        Unit.BYTE_PER_TOKEN,
        "kv_bytes/1: bytes of the cache over rows times tokens that the model has seen.",
        _cache_per_token,
    ),
    _from_memory(
        "effective_bits_per_parameter",
        Unit.BIT,
        "bits_per_parameter/1: 8 weights_bytes over the parameters before compression.",
        _bits_per_parameter,
    ),
    stored(
        "peak_bytes",
        Unit.BYTE,
        "lower",
        "peak/1: highest mark while the artefact is used: CUDA allocator, else resident memory.",
        _peak,
    ),
    stored(
        "load_s",
        Unit.SECOND,
        "lower",
        "load/1: time to load the weights.",
        lambda record: _setup(record, lambda setup: setup.load_seconds),
    ),
    stored(
        "apply_s",
        Unit.SECOND,
        "lower",
        "apply/1: time to apply the stack, calibration included.",
        lambda record: _setup(record, lambda setup: setup.apply_seconds),
    ),
    stored(
        "compile_s",
        Unit.SECOND,
        "lower",
        "compile/1: duration of the first decode step in compiled mode.",
        lambda record: _setup(record, lambda setup: setup.compile_seconds),
    ),
)
