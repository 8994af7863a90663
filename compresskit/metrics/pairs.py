"""Samples of two records that were taken side by side.

Two records are paired where both hold a block of one interleaved session (`Block.pair`). The i-th
turn of such a block took the i-th sample of every speed pass, and turns of one round were taken
within seconds of each other, so what the machine did to both cancels in their ratio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from compresskit.metrics.core import Metric
    from compresskit.record import Block, Record


class Sides(NamedTuple):
    """Values of one metric, equal indices from equal rounds."""

    one: list[float]
    other: list[float]


def side_by_side(metric: Metric, one: Record, other: Record) -> Sides:
    """Return the values of `metric` in rounds that both records took part in; empty if never.

    Only metrics with one sample a repetition can be paired: pooled gaps belong to no round.
    """
    sides = Sides([], [])
    partners = {block.pair: block for block in other.blocks if block.pair is not None}
    for block in one.blocks:
        if block.pair is None or (partner := partners.get(block.pair)) is None:
            continue
        mine, theirs = _by_round(metric, one, block), _by_round(metric, other, partner)
        for number in sorted(mine.keys() & theirs.keys()):
            sides.one.append(mine[number])
            sides.other.append(theirs[number])
    return sides


def _by_round(metric: Metric, record: Record, block: Block) -> dict[int, float]:
    values = metric.samples(record.model_copy(update={"blocks": (block,)}))
    # A repetition without the value would shift all later ones; energy windows only end early.
    early = metric.first_turns and len(values) < len(block.turns)
    if len(values) != len(block.turns) and not early:
        return {}
    return {turn.round: value for turn, value in zip(block.turns, values, strict=False)}
