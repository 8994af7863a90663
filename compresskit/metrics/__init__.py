"""Every printed number, as a pure function of a record.

A record holds arrival times; nothing else is measured while decoding. With

    t0 = 0   the request is sent        n   tokens per row        b   rows of the batch
    t1       the first token is there   c   chunks                P   prompt tokens per row
    tn       the last token is there

the metrics are arithmetic over `(t1, ..., tn)`: the time to the first token is never part of a
time per token, rates over several repetitions are ratios of totals, and a number that does not
exist is `Unavailable` with its reason, never 0. `Arrival.tokens` counts tokens per row, so rates of
a batch multiply by `b`; `drafted` and `accepted` are totals over the batch.

To add a metric, add one entry to the tuple of its file (`SPEED`, `COST`, `MONEY`, ...): a name that
carries the unit, a formula id (raise its version when the meaning changes), the raw values per
repetition.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from compresskit.metrics.cache import CACHE
from compresskit.metrics.core import Better, Metric
from compresskit.metrics.cost import COST
from compresskit.metrics.energy import ENERGY
from compresskit.metrics.formulae import Timed
from compresskit.metrics.memory import MEMORY
from compresskit.metrics.money import MONEY
from compresskit.metrics.quality import IS_BASELINE, QUALITY
from compresskit.metrics.roofline import ROOFLINE
from compresskit.metrics.speculation import SPECULATION
from compresskit.metrics.speed import SPEED, decode_at, main_batch
from compresskit.metrics.speedup import SPEEDUP
from compresskit.metrics.training import TRAINING

if TYPE_CHECKING:
    from collections.abc import Mapping

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for group in (
            SPEED,
            SPECULATION,
            SPEEDUP,
            COST,
            MEMORY,
            CACHE,
            ENERGY,
            MONEY,
            ROOFLINE,
            QUALITY,
            TRAINING,
        )
        for metric in group
    }
)

__all__ = ["IS_BASELINE", "METRICS", "Better", "Metric", "Timed", "decode_at", "main_batch"]
