"""Numbers under the names of MLPerf LoadGen's detail log. This is not an MLPerf result.

Read for this: `loadgen/results.cc` of mlcommons/inference at 05a9cec3 (`ProcessLatencies`,
`ProcessTokenLatencies`, `LogDetail`). MLPerf results come from LoadGen runs of at least ten minutes
on fixed data sets and are reviewed; here only names and formulae are borrowed, so that a reader who
knows them finds the numbers. Every document says so in its first key, and holds no `result_validity`.

The percentile p of n sorted values is the one at index int(n p); times are whole nanoseconds; the
mean is floored; the time per output token is (latency - first token) / (tokens - 1), which a request
of one token does not have. `result_token_throughput` is in tokens per second, as LoadGen's summary
prints it. One request at a time resembles SingleStream, so other batch sizes are left out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compresskit.exchange.exporters.served import single
from compresskit.metrics.formulae import tpot_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.record import Record

NOTICE = (
    "NOT an MLPerf result: measured by compresskit, not by LoadGen, not reviewed by MLCommons. "
    "Only the names and formulae are MLPerf's."
)
PERCENTILES = (0.50, 0.90, 0.95, 0.97, 0.99, 0.999)


def render(records: Sequence[Record]) -> str:
    """Return one document with the results of all records."""
    results = [found for record in records if (found := result(record)) is not None]
    whole = {"notice": NOTICE, "results": results}
    return json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def result(record: Record) -> dict[str, Any] | None:
    """Return the numbers of one record; None where nothing ran one sequence at a time."""
    served = single(record)
    if served is None:
        return None
    count, tokens = len(served.samples), sum(one.tokens for one in served.samples)
    latency = [_ns(one.last) for one in served.samples]
    each = [_ns(value) for one in served.samples if (value := tpot_s(one)) is not None]
    total = sum(latency) / 1e9
    return {
        "notice": NOTICE,
        "source": "compresskit",
        "label": record.label,
        "digest": record.digest,
        "model": record.spec.model.name,
        "device": record.device.name if record.device else None,
        "resembles_scenario": "SingleStream",
        "result_query_count": count,
        "result_qps_without_loadgen_overhead": count / total,
        **_latencies(latency, "result_{}_latency_ns", "result_{}_percentile_latency_ns"),
        **_latencies(
            [_ns(one.first) for one in served.samples],
            "result_first_token_{}_latency_ns",
            "result_first_token_{}_percentile_latency_ns",
        ),
        "result_token_throughput": tokens / total,
        **_latencies(
            each,
            "result_time_to_output_token_{}",
            "result_time_per_output_token_{}_percentile_ns",
        ),
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def at_index(values: Sequence[int], share: float) -> int:
    """MLPerf's percentile: the value at index int(n share) of the sorted values."""
    return sorted(values)[int(len(values) * share)]


def _latencies(values: list[int], extreme: str, percentile: str) -> dict[str, int | None]:
    keys = [extreme.format(kind) for kind in ("min", "max", "mean")]
    keys += [percentile.format(f"{100 * share:.2f}") for share in PERCENTILES]
    if not values:
        return dict.fromkeys(keys)
    found = [min(values), max(values), sum(values) // len(values)]
    found += [at_index(values, share) for share in PERCENTILES]
    return dict(zip(keys, found, strict=True))
