"""Energy: joules per token, per request and per second, from the windows of the energy pass.

Numbers are gross (idle power is in them) unless the name says `net`, and cover what the counter
covers: a GPU's joules are not a system's. Decoding alone is a difference of two loops,

    J per decoded token = (J per answered request − J per prefill) / (n − 1)

because no counter resolves the first token within a request. Its error is that of both loops.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from compresskit.metrics.core import Metric
from compresskit.metrics.windows import (
    Metered,
    like,
    metered,
    per_window,
    provenance,
    spread,
    total_ratio,
    unlike,
)
from compresskit.record import Measured, Reading, Unavailable
from compresskit.stats import standard_error
from compresskit.units import Unit

if TYPE_CHECKING:
    from compresskit.record import Record

__all__ = ["ENERGY", "provenance", "spread"]

_NO_TOKENS = "the energy window counted no tokens"
_NO_REQUESTS = "the energy windows do not tell how many requests they held"


def _joules(one: Metered) -> float:
    return one.joules


def _per_request(one: Metered) -> float:
    return one.joules / one.requests


def _all_tokens(one: Metered) -> float:
    return one.requests * (one.of.prompt_tokens + one.of.new_tokens)


def _net(one: Metered) -> float:
    """Joules less those that the idle machine would have drawn."""
    idle = one.of.idle
    if idle is None or idle.reading.value is None or not idle.window_seconds:
        return 0.0
    return one.joules - idle.reading.value / idle.window_seconds * one.seconds


def _net_tokens(one: Metered) -> float:
    known = one.of.idle is not None and one.of.idle.reading.value is not None
    return one.tokens if known and one.seconds else 0.0


def _dram(one: Metered) -> float:
    reading = one.window.domains.get("dram")
    return 0.0 if reading is None or reading.value is None else reading.value


def _integrated(one: Metered) -> float:
    reading = one.window.integrated
    return reading.value if isinstance(reading, Measured) else 0.0


class _Decode(NamedTuple):
    """The windows whose difference is decoding; `steps` tokens of a request come after the first."""

    generate: list[Metered]
    prefill: list[Metered]
    steps: int

    def joules(self) -> float:
        """Per decoded token, over all windows."""
        whole, first = (
            total_ratio(side, _joules, lambda one: one.requests)
            for side in (self.generate, self.prefill)
        )
        return (whole - first) / self.steps

    def samples(self) -> list[float]:
        """Windows of one turn side by side."""
        pairs = zip(self.generate, self.prefill, strict=False)
        return [(_per_request(whole) - _per_request(first)) / self.steps for whole, first in pairs]

    def stderr(self) -> float | None:
        """Errors of both sides, as independent ones add up."""
        errors = [
            standard_error([_per_request(one) for one in side])
            for side in (self.generate, self.prefill)
        ]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / self.steps if len(known) == len(errors) else None


def _decode(record: Record) -> _Decode | Unavailable:
    generate, prefill = metered(record, "generate"), metered(record, "prefill")
    if isinstance(generate, Unavailable):
        return generate
    if isinstance(prefill, Unavailable):
        return prefill
    both = [*generate, *prefill]
    if problem := unlike(both):
        return problem
    if any(one.requests <= 0 for one in both):
        return Unavailable(reason=_NO_REQUESTS)
    steps = generate[0].of.new_tokens - 1
    if steps < 1:
        return Unavailable(reason="a request of one token decodes nothing")
    found = _Decode(generate, prefill, steps)
    if found.joules() <= 0:
        return Unavailable(
            reason="generating drew no more than prefill: decoding is below the noise"
        )
    mixed = like(both, 0.0, Unit.JOULE)
    return mixed if isinstance(mixed, Unavailable) else found


def _decode_value(record: Record) -> Reading:
    found = _decode(record)
    if isinstance(found, Unavailable):
        return found
    return like([*found.generate, *found.prefill], found.joules(), Unit.JOULE_PER_TOKEN)


def _decode_samples(record: Record) -> list[float]:
    found = _decode(record)
    return [] if isinstance(found, Unavailable) else found.samples()


def _decode_error(record: Record) -> float | None:
    found = _decode(record)
    return None if isinstance(found, Unavailable) else found.stderr()


ENERGY: tuple[Metric, ...] = (
    per_window(
        "j_per_output_token",
        Unit.JOULE_PER_TOKEN,
        "j_output/1: gross energy of the generate window, prefill included, per delivered token.",
        "generate",
        _joules,
        lambda one: one.tokens,
        lacks=_NO_TOKENS,
    ),
    per_window(
        "j_per_prefill_token",
        Unit.JOULE_PER_TOKEN,
        "j_prefill/1: gross energy of the prefill window per prompt token.",
        "prefill",
        _joules,
        lambda one: one.tokens,
        lacks=_NO_TOKENS,
    ),
    per_window(
        "j_per_total_token",
        Unit.JOULE_PER_TOKEN,
        "j_total/1: gross energy of the generate window per prompt or delivered token.",
        "generate",
        _joules,
        _all_tokens,
        lacks=_NO_REQUESTS,
    ),
    per_window(
        "j_per_request",
        Unit.JOULE,
        "j_request/1: gross energy of the generate window per answered request, one row each.",
        "generate",
        _joules,
        lambda one: one.requests,
        lacks=_NO_REQUESTS,
    ),
    Metric(
        "j_per_decode_token",
        Unit.JOULE_PER_TOKEN,
        "lower",
        "j_decode/1: (J per generated request - J per prefill) / (n - 1), both gross.",
        _decode_samples,
        _decode_value,
        _decode_error,
        first_turns=True,
    ),
    per_window(
        "net_j_per_output_token",
        Unit.JOULE_PER_TOKEN,
        "j_output_net/1: j_per_output_token less idle watts times seconds; shown beside gross.",
        "generate",
        _net,
        _net_tokens,
        lacks="no idle window, or the work drew no more than the idle machine",
    ),
    per_window(
        "dram_j_per_output_token",
        Unit.JOULE_PER_TOKEN,
        "j_dram/1: energy of the memory per delivered token; never part of j_per_output_token.",
        "generate",
        _dram,
        lambda one: one.tokens if _dram(one) else 0.0,
        lacks="no counter of the memory beside this one",
    ),
    per_window(
        "mean_watts",
        Unit.WATT,
        "mean_watts/1: gross energy of the generate windows over their seconds.",
        "generate",
        _joules,
        lambda one: one.seconds,
        lacks="the energy windows do not tell how long they were",
        better="none",
    ),
    per_window(
        "idle_watts",
        Unit.WATT,
        "idle_watts/1: energy over seconds with the model loaded and nothing running.",
        "idle",
        _joules,
        lambda one: one.seconds,
        lacks="the idle window does not tell how long it was",
    ),
    per_window(
        "energy_cross_check",
        Unit.RATIO,
        "energy_check/1: counter over integrated power, of the generate windows.",
        "generate",
        _joules,
        _integrated,
        lacks="no integrated power beside the counter",
        better="none",
    ),
)
