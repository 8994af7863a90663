"""A record as other tools see one: requests of one shape, served one batch after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskit.metrics.speed import latency, throughput

if TYPE_CHECKING:
    from compresskit.metrics import Timed
    from compresskit.record import Record


@dataclass(frozen=True)
class Served:
    """Repetitions at one batch size; never empty, and every repetition delivered tokens."""

    batch: int
    prompt_tokens: int
    samples: tuple[Timed, ...]
    chunked: bool
    """Whether each chunk was timed. The throughput pass marks only the first and the last."""


def by_batch(record: Record) -> list[Served]:
    """Return what was measured at each batch size, the chunk-wise pass where there is a choice."""
    found: dict[int, Served] = {}
    for chunked, samples in (
        (True, latency(record)),
        *((False, throughput(record, b)) for b in record.spec.workload.batch_sizes),
    ):
        kept = tuple(one for one in samples if one.chunks and one.first > 0)
        if kept and kept[0].batch not in found:
            found[kept[0].batch] = Served(
                kept[0].batch, round(kept[0].prompt_tokens), kept, chunked
            )
    return list(found.values())


def single(record: Record) -> Served | None:
    """What was measured one sequence at a time; None if that was not."""
    return next((served for served in by_batch(record) if served.batch == 1), None)
