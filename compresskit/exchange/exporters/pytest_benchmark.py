"""pytest-benchmark's `--benchmark-json`: one benchmark per record, batch size and duration.

Read for this: `stats.py` and `plugin.py` of pytest-benchmark 5.3.1 (`Stats.fields`,
`Metadata.as_dict`, `pytest_benchmark_generate_json`). Only durations are exported, under our names;
each repetition is a round of one iteration. stddev has ddof 1; the quartiles are the tool's
(position (n - 2) / 4 from either end, interpolated), outliers count what lies beyond one standard
deviation or 1.5 interquartile ranges. The standard deviation of a single round is null.
"""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from compresskit.exchange.exporters.served import by_batch
from compresskit.metrics.formulae import e2e_s, gaps_s, tpot_s, ttft_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.exchange.exporters.served import Served
    from compresskit.record import Record

LAYOUT = "5.3.1"
"""Version of pytest-benchmark whose layout this is."""


def render(records: Sequence[Record]) -> str:
    """Return one document with the benchmarks of all records."""
    return json.dumps(document(records), indent=4, allow_nan=False, ensure_ascii=False) + "\n"


def document(records: Sequence[Record]) -> dict[str, Any]:
    """Return the document; machine and commit are those of the first record."""
    first = records[0]
    environment, device = first.environment, first.device
    git = environment.git if environment else None
    return {
        "machine_info": {
            "node": None,
            "processor": None,
            "machine": None,
            "python_implementation": None,
            "python_version": environment.python if environment else None,
            "release": environment.platform if environment else None,
            "system": None,
            "cpu": {"brand_raw": device.name if device and device.kind == "cpu" else None},
        },
        "commit_info": {
            "id": git.commit if git else "unversioned",
            "time": None,
            "author_time": None,
            "dirty": git.dirty if git else None,
            "project": "compresskit",
            "branch": None,
        },
        "benchmarks": [one for record in records for one in benchmarks(record)],
        "datetime": first.started_at,
        "version": LAYOUT,
    }


def benchmarks(record: Record) -> Iterator[dict[str, Any]]:
    """Yield one benchmark per batch size and duration."""
    for served in by_batch(record):
        for name, seconds in _durations(served).items():
            if seconds:
                yield _benchmark(record, served, name, seconds)


def _durations(served: Served) -> dict[str, list[float]]:
    per_request = {"ttft_s": ttft_s, "tpot_s": tpot_s, "e2e_s": e2e_s}
    found = {
        name: [value for one in served.samples if (value := formula(one)) is not None]
        for name, formula in per_request.items()
    }
    if served.chunked:
        found["itl_s"] = [gap for one in served.samples for gap in gaps_s(one)]
    return found


def _benchmark(record: Record, served: Served, name: str, seconds: list[float]) -> dict[str, Any]:
    workload = record.spec.workload
    parameters = {
        "run": record.label,
        "batch": served.batch,
        "prompt_tokens": served.prompt_tokens,
        "new_tokens": workload.new_tokens,
    }
    given = "-".join(map(str, parameters.values()))
    return {
        "group": f"{record.spec.model.name} {name}",
        "name": f"{name}[{given}]",
        "fullname": f"compresskit/{record.spec.model.name}::{name}[{given}]",
        "params": parameters,
        "param": given,
        "extra_info": {"source": "compresskit", "digest": record.digest, "unit": "s"},
        "options": {"disable_gc": True, "warmup": record.spec.protocol.warmups > 0},
        "stats": {**describe(seconds), "data": seconds, "iterations": 1},
    }


def describe(seconds: Sequence[float]) -> dict[str, float | int | str | None]:
    """Return the tool's statistics of at least one value, in its order."""
    data = sorted(seconds)
    mean = statistics.mean(data)
    spread = statistics.stdev(data) if len(data) > 1 else None
    low, high = _quartile(data), -_quartile([-value for value in reversed(data)])
    iqr = high - low
    near = [value for value in data if low - 1.5 * iqr <= value <= high + 1.5 * iqr]
    beyond = sum(1 for value in data if abs(value - mean) > (spread or 0.0))
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": spread,
        "rounds": len(data),
        "median": statistics.median(data),
        "iqr": iqr,
        "q1": low,
        "q3": high,
        "iqr_outliers": len(data) - len(near),
        "stddev_outliers": beyond if spread is not None else 0,
        "outliers": f"{beyond if spread is not None else 0};{len(data) - len(near)}",
        "ld15iqr": near[0],
        "hd15iqr": near[-1],
        "ops": len(data) / sum(data) if sum(data) > 0 else None,
        "total": sum(data),
    }


def _quartile(data: Sequence[float]) -> float:
    """Lower quartile of sorted values: position (n - 2) / 4, interpolated."""
    if len(data) == 1:
        return data[0]
    whole, quarters = divmod(len(data) - 2, 4)
    if not quarters:
        return data[whole]
    return data[whole] + quarters / 4 * (data[whole + 1] - data[whole])
