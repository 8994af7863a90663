"""What rules yield and what they look at: findings, and the repetitions of a speed pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit.stats import median

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.record import Block, Record, Sample

FEWEST_SAMPLES = 3
"""An interval from two values is no interval."""
LARGEST_DRIFT = 0.10
"""Allowed change of a median from the first third of a session to the last."""


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
    paces: tuple[float, ...] = ()
    """The yardstick beside each sample, in seconds; empty where it was not read."""

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
    read = paces(block)
    one = block.passes.latency
    if one is not None:
        beside = read if len(read) == len(one.samples) else ()
        yield Series("latency pass", one.new_tokens, one.warmups, one.samples, beside)
    for many in block.passes.throughput or ():
        if many.samples:
            name = f"throughput pass at batch {many.batch}"
            beside = read if len(read) == len(many.samples) else ()
            yield Series(name, many.new_tokens, many.warmups, many.samples, beside)


def paces(block: Block) -> tuple[float, ...]:
    """The yardstick of every turn; empty where one was not read, or cannot be."""
    read = tuple(turn.yardstick for turn in block.turns if turn.yardstick is not None)
    return read if len(read) == len(block.turns) and all(pace > 0 for pace in read) else ()


def change(values: Sequence[float]) -> float | None:
    """How much the median of the last third differs from that of the first, as a share of it.

    None with fewer than four values: one repetition alone is an outlier as often as a trend.
    """
    third = max(2, len(values) // 3)
    if len(values) < 2 * third:
        return None
    first, last = median(values[:third]), median(values[-third:])
    return last / first - 1 if first > 0 else None
