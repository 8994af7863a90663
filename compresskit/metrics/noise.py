"""The noise of a machine, as the repetitions of its records show it.

Two quantities, both in seconds: `decode` (time per forward pass after the first token) and `ttft`.
Per forward pass, because a prompt that speculates badly is no unrest of the machine.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from compresskit.metrics.formulae import Timed, decode_s, ttft_s
from compresskit.metrics.pairs import side_by_side
from compresskit.metrics.speed import headline, missing_headline, per_repetition
from compresskit.stats.calibration import FEWEST, Noise
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compresskit.metrics.core import Metric
    from compresskit.metrics.pairs import Sides
    from compresskit.record import Record


def seconds_per_forward(one: Timed) -> float | None:
    """Time of decoding over the forward passes after the prompt's."""
    span, steps = decode_s(one), one.sample.forwards - 1
    return None if span is None or steps < 1 else span / steps


QUANTITIES: Mapping[str, Metric] = {
    "decode": per_repetition(
        "seconds_per_forward",
        Unit.SECOND,
        "lower",
        "noise_decode/1: (tn - t1) over the forward passes after the first.",
        seconds_per_forward,
        source=headline,
        missing=missing_headline,
    ),
    "ttft": per_repetition("ttft_s", Unit.SECOND, "lower", "ttft/1: t1 - t0.", ttft_s),
}


class Recorded(NamedTuple):
    """Noise of one quantity and where it comes from."""

    noise: Noise
    series: int
    """Runs, or interleaved sessions, that gave it."""


def recorded(quantity: str, records: Sequence[Record]) -> Recorded:
    """Noise of `quantity` in `records`: whole rounds where enough were interleaved, else samples.

    Raises:
        ValueError: the records hold too few samples.
    """
    metric = QUANTITIES[quantity]
    rounds = [sides for sides in _sessions(metric, records) if len(sides.one) >= 3]
    if sum(len(sides.one) for sides in rounds) >= FEWEST:
        return Recorded(Noise.of_rounds(rounds), len(rounds))
    series = [
        values
        for record in records
        for block in record.blocks
        if len(values := metric.samples(record.model_copy(update={"blocks": (block,)}))) >= 3
    ]
    return Recorded(Noise.of_series(series), len(series))


def _sessions(metric: Metric, records: Sequence[Record]) -> Iterator[Sides]:
    """Two sides of each session: more of its arms would count the same rounds again."""
    seen: set[str] = set()
    for one, other in combinations(records, 2):
        shared = {block.pair for block in one.blocks} & {block.pair for block in other.blocks}
        new = {pair for pair in shared if pair is not None} - seen
        if new:
            seen |= new
            yield side_by_side(metric, _only(one, new), _only(other, new))


def _only(record: Record, pairs: set[str]) -> Record:
    blocks = tuple(block for block in record.blocks if block.pair in pairs)
    return record.model_copy(update={"blocks": blocks})
