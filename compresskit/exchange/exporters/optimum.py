"""optimum-benchmark's `benchmark_report.json`: the five targets of its text-generation scenario.

Read for this: `benchmark/report.py` (0a334f21), `trackers/latency.py` (026ddcdc),
`trackers/memory.py` (006e800c), `trackers/energy.py` (006e800c) and
`scenarios/inference/scenario.py` (028631e2) of huggingface/optimum-benchmark.

    load_model   loading the weights          generate   the whole request
    prefill      time to the first token      decode     first to last token
    per_token    gaps between decode calls: each request's gaps once (the tool's list is extended
                 with its own earlier events and then holds waits for the first token too)

Throughput is the volume of one call over the mean latency: `samples/s` for generate and prefill
(sequences, not tokens), `tokens/s` for decode, with b (n - 1) tokens. stdev has ddof 0, `stdev_` is
it in per cent of the mean, memory is in MB of 10^6 bytes, energy in kWh per call. Estimated energy
is left out: the format cannot say that it was not measured.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from compresskit.exchange.exporters.served import by_batch
from compresskit.metrics import METRICS
from compresskit.metrics.formulae import gaps_s
from compresskit.record import Measured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.exchange.exporters.served import Served
    from compresskit.record import EnergyPass, Record

_JOULES_PER_KWH = 3.6e6
_COUNTERS = {
    "max_ram": "rss",
    "max_global_vram": "device_vram",
    "max_process_vram": "process_vram",
    "max_reserved": "cuda_reserved",
    "max_allocated": "cuda_allocated",
}


def render(records: Sequence[Record]) -> str:
    """Return the report of one record: the format holds one run."""
    (record,) = records
    return json.dumps(report(record), indent=4, allow_nan=False, ensure_ascii=False) + "\n"


def report(record: Record) -> dict[str, Any]:
    """Return the targets with their measurements; what was not measured is null."""
    targets = {name: _empty() for name in ("load_model", "generate", "prefill", "decode")}
    targets["per_token"] = _empty()
    if record.setup is not None:
        targets["load_model"]["latency"] = _latency([record.setup.load_seconds])
    served = next(iter(by_batch(record)), None)
    if served is not None:
        _speed(targets, served)
    for target, phase in (("load_model", "load"), ("prefill", "prefill"), ("decode", "decode")):
        targets[target]["memory"] = _memory(record, phase)
    _energy(targets, record)
    return targets


def _empty() -> dict[str, Any]:
    return dict.fromkeys(("memory", "latency", "throughput", "energy", "efficiency"))


def _speed(targets: dict[str, dict[str, Any]], served: Served) -> None:
    first = [one.first for one in served.samples]
    decode = [one.last - one.first for one in served.samples if one.last > one.first]
    targets["prefill"] |= _timed(first, served.batch, "samples/s")
    targets["generate"] |= _timed([one.last for one in served.samples], served.batch, "samples/s")
    volumes = {one.batch * (one.tokens - 1) for one in served.samples if one.last > one.first}
    if len(volumes) == 1:
        targets["decode"] |= _timed(decode, volumes.pop(), "tokens/s")
    if served.chunked:
        targets["per_token"]["latency"] = _latency(
            [g for one in served.samples for g in gaps_s(one)]
        )


def _timed(seconds: list[float], volume: int, unit: str) -> dict[str, Any]:
    rate = {"unit": unit, "value": volume / float(np.mean(seconds))}
    return {"latency": _latency(seconds), "throughput": rate}


def _latency(seconds: list[float]) -> dict[str, Any] | None:
    if not seconds:
        return None
    values = np.asarray(seconds)
    mean = float(values.mean())
    spread = float(values.std()) if len(seconds) > 1 else None
    percentiles = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 95, 99)}
    return {
        "unit": "s",
        "values": seconds,
        "count": len(seconds),
        "total": sum(seconds),
        "mean": mean,
        **percentiles,
        "stdev": spread,
        "stdev_": 100 * spread / mean if spread is not None and mean else None,
    }


def _memory(record: Record, phase: str) -> dict[str, Any] | None:
    """Peaks of one window, from the last block that has it; null where no counter was read."""
    for block in reversed(record.blocks):
        found = block.passes.memory.phases.get(phase) if block.passes.memory else None
        if found is None:
            continue
        peaks = {
            name: reading.value / 1e6
            for name, counter in _COUNTERS.items()
            if isinstance(reading := found.peaks.get(counter), Measured)
        }
        if peaks:
            return {"unit": "MB", **{name: peaks.get(name) for name in _COUNTERS}}
    return None


def _energy(targets: dict[str, dict[str, Any]], record: Record) -> None:
    """Kilowatt-hours of one call; decode is what generating takes beyond the prefill."""
    done = next((b.passes.energy for b in record.blocks if b.passes.energy is not None), None)
    if done is None:
        return
    shapes = {"prefill": done.prompt_tokens, "generate": done.new_tokens}
    names = {"prefill": "j_per_prefill_token", "generate": "j_per_output_token"}
    spent: dict[str, float] = {}
    for target, tokens in shapes.items():
        reading = METRICS[names[target]].value(record)
        if isinstance(reading, Measured) and tokens:
            spent[target] = reading.value * done.batch * tokens / _JOULES_PER_KWH
            targets[target] |= _spent(spent[target], done.batch, "samples/kWh", done)
    if len(spent) == 2 and spent["generate"] > spent["prefill"] and done.new_tokens > 1:
        rest, volume = spent["generate"] - spent["prefill"], done.batch * (done.new_tokens - 1)
        targets["decode"] |= _spent(rest, volume, "tokens/kWh", done)


def _spent(kwh: float, volume: int, unit: str, done: EnergyPass) -> dict[str, Any]:
    scope = next((window.scope for window in (*done.generate, *done.prefill)), None)
    parts = {"cpu": "package", "ram": "dram", "gpu": "gpu"}
    energy = {part: kwh if scope == covered else None for part, covered in parts.items()}
    return {
        "energy": {"unit": "kWh", **energy, "total": kwh},
        "efficiency": {"unit": unit, "value": volume / kwh},
    }
