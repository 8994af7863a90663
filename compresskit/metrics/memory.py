"""Memory: what a phase's peak is made of, and the bytes of the cache, step by step.

The parts of a peak are read one by one, so they never quite add up to it. What is left over is a
number of its own here, `unattributed`; it may be negative, where two parts claim the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit.metrics.core import Metric, combine, missing_from, stored
from compresskit.record import Estimated, Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.metrics.core import Better
    from compresskit.record import MemoryPass, Phase, Record

USED = ("prefill", "decode")
"""Phases in which the artefact is used; the others are over before."""


class Rest(NamedTuple):
    """What the parts of a peak leave over."""

    reading: Reading
    missing: tuple[str, ...] = ()
    """Parts that could not be read, and so are in the rest."""


def unattributed(phase: Phase) -> Rest:
    """The peak of `phase` less all of its parts."""
    peak = phase.peaks.get(phase.counter or "")
    if peak is None:
        return Rest(Unavailable(reason="no part of this peak was read"))
    if isinstance(peak, Unavailable):
        return Rest(peak)
    missing = tuple(name for name, part in phase.parts.items() if part.value is None)
    known = [part for part in phase.parts.values() if part.value is not None]
    if not known:
        return Rest(Unavailable(reason="no part of this peak was read"), missing)
    value = peak.value - sum(part.value for part in known)
    guessed = [part.model for part in (peak, *known) if isinstance(part, Estimated)]
    if guessed:
        return Rest(Estimated(value=value, unit=Unit.BYTE, model=guessed[0]), missing)
    source = f"{phase.counter} less {', '.join(n for n in phase.parts if n not in missing)}"
    return Rest(Measured(value=value, unit=Unit.BYTE, source=source), missing)


def _last(record: Record) -> MemoryPass | None:
    """The memory pass of the last block that has one: bytes do not vary."""
    passes = [block.passes.memory for block in record.blocks if block.passes.memory is not None]
    return passes[-1] if passes else None


def _part(record: Record, name: str) -> Reading:
    """The largest that a part was in the phases of use."""
    one = _last(record)
    found = [] if one is None else [one.phases[p].parts.get(name) for p in USED if p in one.phases]
    readings = [part for part in found if part is not None]
    return combine(readings, max, unit=Unit.BYTE, absent=missing_from(record, "memory"))


def _rest(record: Record) -> Reading:
    """The decode phase's."""
    one = _last(record)
    if one is None or "decode" not in one.phases:
        return missing_from(record, "memory")
    return unattributed(one.phases["decode"]).reading


def _share(record: Record) -> Reading:
    rest, one = _rest(record), _last(record)
    if isinstance(rest, Unavailable) or one is None:
        return rest
    phase = one.phases["decode"]
    peak = phase.peaks[phase.counter or ""]
    if not peak.value:
        return Unavailable(reason="the peak is zero")
    return rest.model_copy(update={"value": rest.value / peak.value, "unit": Unit.RATIO})


def _counted(
    name: str, unit: Unit, definition: str, pick: Callable[[MemoryPass], int | None]
) -> Metric:
    def read(record: Record) -> Reading:
        one = _last(record)
        value = None if one is None else pick(one)
        if value is None:
            return missing_from(record, "memory")
        return Measured(value=value, unit=unit, source="counted")

    return stored(name, unit, "lower", definition, read)


def _of_part(name: str, better: Better, words: str) -> Metric:
    return stored(
        f"{name}_bytes",
        Unit.BYTE,
        better,
        f"part_{name}/1: {words}, the larger of prefill and decode.",
        lambda record: _part(record, name),
    )


MEMORY = (
    _counted(
        "kv_bytes",
        Unit.BYTE,
        "kv_total/1: bytes that the cache keeps alive at the end of the request, slack included.",
        lambda one: sum(one.cache_bytes.values()) if one.cache_bytes else None,
    ),
    _counted(
        "moved_bytes",
        Unit.BYTE,
        "moved/1: bytes that one decode step has to read: weights in use, cache without slack.",
        lambda one: sum(one.moved_bytes.values()) if one.moved_bytes else None,
    ),
    _counted(
        "operations_per_step",
        Unit.COUNT,
        "operations/1: operations that torch dispatches in one decode step, views left out.",
        lambda one: one.operations_per_step,
    ),
    _of_part(
        "activations", "lower", "most bytes of live tensors that are neither weights nor cache"
    ),
    _of_part("workspace", "lower", "memory of operators beside tensors"),
    _of_part("slack", "lower", "memory that the allocator holds and nobody uses"),
    stored(
        "unattributed_bytes",
        Unit.BYTE,
        "none",
        "unattributed/1: peak of the decode phase less its parts; negative where parts overlap.",
        _rest,
    ),
    stored(
        "unattributed_share",
        Unit.RATIO,
        "none",
        "unattributed_share/1: unattributed_bytes over the peak of the decode phase.",
        _share,
    ),
)
