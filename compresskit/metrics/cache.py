"""What a cache method asks for, what it reaches, and what a decode step moves of it.

    nominal     from the parameters: numbers dropped, bits per number; scales and indices forgotten
    achieved    bytes of the model's own cache at the same tokens / bytes really held
    effective   8 · bytes held / numbers that the model's own cache would hold

The three are told apart because the first is what papers headline and the second is what memory
shows. The model's own cache is what its layers keep of the keys and values that really arrived
(`measure.memory.arrivals`): key/value heads, its type, sliding layers with their window only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compresskit.metrics.core import combine, missing_from, stored
from compresskit.record import Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from pydantic import JsonValue

    from compresskit.record import MemoryPass, Record

BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
"""Of a number in the model's type."""
OWN = "the cache is the model's own"


def changed(record: Record) -> bool:
    """Whether a method of the stack has put another cache in."""
    return "cache_nominal" in record.facts


def _last(record: Record) -> MemoryPass | None:
    passes = [block.passes.memory for block in record.blocks if block.passes.memory is not None]
    return passes[-1] if passes else None


def _nominal(record: Record) -> Reading:
    """Product of what was asked for: a share or a number of tokens, bits of a number."""
    if record.status != "ok":
        return missing_from(record, "memory")
    if not changed(record):
        return Unavailable(reason=OWN)
    asked = record.facts["cache_nominal"]
    if not isinstance(asked, Mapping):
        return Unavailable(reason="what was asked for is not told in shares, tokens or bits")
    factors = [
        factor
        for factor in (_by_share(asked), _by_tokens(asked, record), _by_bits(asked, record))
        if factor is not None
    ]
    for factor in factors:
        if isinstance(factor, Unavailable):
            return factor
    known = [factor for factor in factors if not isinstance(factor, Unavailable)]
    if not known:
        return Unavailable(reason="the method does not ask for fewer or smaller rows")
    value = 1.0
    for factor in known:
        value *= factor
    return Measured(value=value, unit=Unit.RATIO, source="parameters")


def _number(value: JsonValue) -> float | None:
    """`value` if it is a number above 0."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) if known else None  # type: ignore[arg-type]


def _by_share(asked: Mapping[str, JsonValue]) -> float | Unavailable | None:
    if "keep_share" not in asked:
        return None
    share = _number(asked["keep_share"])
    return Unavailable(reason="no token is kept") if share is None else 1 / share


def _by_tokens(asked: Mapping[str, JsonValue], record: Record) -> float | Unavailable | None:
    """A number of tokens is a ratio only at a length: that at which the cache was weighed."""
    if "keep_tokens" not in asked:
        return None
    tokens, one = _number(asked["keep_tokens"]), _last(record)
    if tokens is None:
        return Unavailable(reason="no token is kept")
    if one is None:
        absent = missing_from(record, "memory")
        return Unavailable(reason=f"at which length: {absent.reason}")
    return max(1.0, one.tokens_in_cache / tokens)


def _by_bits(asked: Mapping[str, JsonValue], record: Record) -> float | Unavailable | None:
    """Keys and values may have bits of their own, in a list."""
    if "bits" not in asked:
        return None
    given = asked["bits"]
    sides = [_number(side) for side in (given if isinstance(given, list) else [given])]
    known = [side for side in sides if side is not None]
    full = BITS.get(record.model.dtype) if record.model is not None else None
    if full is None or not known or len(known) < len(sides):
        return Unavailable(
            reason="the bits of the model's own cache, or of this one, are not known"
        )
    return full / (sum(known) / len(known))


def _simulated(record: Record) -> bool:
    return any(name.startswith("kv/") for name in record.simulated)


def _dense(record: Record) -> tuple[MemoryPass, Mapping[str, int]] | Unavailable:
    """The memory pass with what the model's own cache would hold."""
    one = _last(record)
    if one is None or record.status != "ok":
        return missing_from(record, "memory")
    if one.dense_cache is None:
        return Unavailable(
            reason="no keys and values are cached"
            if _keeps_nothing(record)
            else "the record does not tell what the model's own cache would hold"
        )
    return one, one.dense_cache


def _keeps_nothing(record: Record) -> bool:
    asked = record.facts.get("cache_nominal")
    return isinstance(asked, Mapping) and asked.get("keep_tokens") == 0


def _held(one: MemoryPass) -> int:
    return sum(one.cache_bytes.values())


def _achieved(record: Record) -> Reading:
    found = _dense(record)
    if isinstance(found, Unavailable):
        return found
    one, dense = found
    if not _held(one):
        return Unavailable(reason="the cache holds nothing")
    # Rows that are only masked are still held.
    value = 1.0 if _simulated(record) else dense["bytes"] / _held(one)
    return Measured(value=value, unit=Unit.RATIO, source="storage bytes")


def _effective_bits(record: Record) -> Reading:
    found = _dense(record)
    if isinstance(found, Unavailable):
        return found
    one, dense = found
    held = dense["bytes"] if _simulated(record) else _held(one)
    return Measured(value=8 * held / dense["numbers"], unit=Unit.BIT, source="storage bytes")


def _read(record: Record) -> Reading:
    one = _last(record)
    if one is None or record.status != "ok":
        return missing_from(record, "memory")
    if not one.moved_bytes:
        return Unavailable(reason="the bytes that a step has to move were not counted")
    moved = sum(one.moved_bytes.get(kind, 0) for kind in ("cache", "cache_copy"))
    return Measured(value=moved / one.batch, unit=Unit.BYTE_PER_TOKEN, source="storage bytes")


def _peak(record: Record) -> Reading:
    one = _last(record)
    parts = (
        []
        if one is None
        else [phase.parts["cache"] for phase in one.phases.values() if "cache" in phase.parts]
    )
    return combine(parts, max, unit=Unit.BYTE, absent=missing_from(record, "memory"))


CACHE = (
    stored(
        "cache_nominal_ratio",
        Unit.RATIO,
        "higher",
        "cache_nominal/1: what the parameters ask for, metadata forgotten: tokens over tokens kept, "
        "times bits of the model's type over bits of a code (the mean of keys and values).",
        _nominal,
    ),
    stored(
        "cache_achieved_ratio",
        Unit.RATIO,
        "higher",
        "cache_achieved/1: bytes of the model's own cache at the same tokens over bytes held, "
        "scales, residual, indices and slack included; 1 where the saving is simulated.",
        _achieved,
    ),
    stored(
        "cache_effective_bits",
        Unit.BIT,
        "lower",
        "cache_bits/1: 8 bytes held over the numbers of the model's own cache at the same tokens.",
        _effective_bits,
    ),
    stored(
        "cache_bytes_read_per_token",
        Unit.BYTE_PER_TOKEN,
        "lower",
        "cache_read/1: bytes of the cache that a decode step touches at its final length, a row of "
        "the batch: what is read, and the full-precision copy where one is written.",
        _read,
    ),
    stored(
        "cache_peak_bytes",
        Unit.BYTE,
        "lower",
        "cache_peak/1: most bytes of the cache after the prefill or any decode step.",
        _peak,
    ),
)
