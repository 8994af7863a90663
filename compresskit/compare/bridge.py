"""Carry clocks from one session to another.

Two sessions met two different machines, even if it is the same box: another load, another clock
rate. Three things are taken into account before their times are put beside each other:

waiting     Seconds in which the run was ready and another process had the CPU are taken off each
            repetition. A sleep in our own code is no waiting, so a slow program stays slow.
pace        The yardstick, a fixed piece of work beside each turn, says how much slower the machine
            itself was. The practical factor is widened by that much, never narrowed.
sessions    Equal programs in two processes differ by more than the repetitions of one process show
            (memory layout, neighbours on the chip), hence a larger practical factor than in a pair.

Where these cannot be known, there is a reason instead of a verdict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit.stats import median

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.metrics import Timed
    from compresskit.record import Record, Sample

MOST_WAITING = 0.5
"""Share of the time spent waiting for a CPU above which the rest says little. Measured on two
cores with the tiny model: at 66 % waiting a decode step net of waiting took 1.10 times as long as
on the quiet machine (cold caches), gross 3.3 times."""


class Bridge(NamedTuple):
    """Two sessions whose times may be compared."""

    pace: float
    """How much longer the yardstick took in the new session."""


def build(base: Record, new: Record) -> Bridge | str:
    """Return what lies between the two sessions, or why they cannot be compared."""
    for side, one in (("base", base), ("new", new)):
        if reason := _unquiet(one):
            return f"{side}: {reason}"
    before, after = _yardstick(base), _yardstick(new)
    if before is None or after is None:
        side = "base" if before is None else "new"
        return f"the {side} record has no yardstick of the machine: measure it again"
    return Bridge(after / before)


def shares(record: Record, repetitions: Sequence[Timed]) -> list[float]:
    """Share of each repetition that was not spent waiting for a CPU.

    Waiting is counted over a whole repetition, so it is taken off every part of it alike. On a GPU
    it is not taken off: the device goes on while the host waits.
    """
    if not _on_cpu(record):
        return [1.0] * len(repetitions)
    return [_working(one.sample) for one in repetitions]


def _working(sample: Sample) -> float:
    if not sample.arrivals or not sample.waited or sample.arrivals[-1].seconds <= sample.waited:
        return 1.0
    return 1 - sample.waited / sample.arrivals[-1].seconds


def _samples(record: Record) -> list[Sample]:
    return [
        sample
        for block in record.blocks
        for one in (block.passes.latency, *(block.passes.throughput or ()))
        if one is not None
        for sample in one.samples
        if sample.arrivals
    ]


def _unquiet(record: Record) -> str:
    """Say why the load on the machine cannot be told from the work; empty if it can."""
    samples = _samples(record)
    waited = [sample.waited for sample in samples if sample.waited is not None]
    busy = sum(sample.arrivals[-1].seconds for sample in samples)
    if waited and busy > 0 and sum(waited) / busy > MOST_WAITING:
        return f"{sum(waited) / busy:.0%} of the time was spent waiting for a CPU"
    if len(waited) == len(samples) and not _several_threads(record):
        return ""
    # Nobody counted what the load took (or only for one of several threads): ask for a quiet machine.
    cpus = None if record.environment is None else record.environment.cpu_count
    loads = [block.load_average[0] for block in record.blocks if block.load_average is not None]
    if cpus is None or not loads:
        return "neither waiting nor the load of the machine was recorded"
    if max(loads) > cpus:
        return f"load average {max(loads):.1f} on {cpus} CPUs, and waiting was not counted in full"
    return ""


def _several_threads(record: Record) -> bool:
    threads = None if record.device is None else record.device.threads
    return _on_cpu(record) and (threads or 1) > 1


def _on_cpu(record: Record) -> bool:
    return record.device is None or record.device.kind == "cpu"


def _yardstick(record: Record) -> float | None:
    readings = [
        turn.yardstick
        for block in record.blocks
        for turn in block.turns
        if turn.yardstick is not None and turn.yardstick > 0
    ]
    return median(readings) if readings else None
