"""Rules about the machine: load, pace, clocks, heat, other processes, threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.stats import median
from compresskit.validity.finding import LARGEST_DRIFT, Finding, change, paces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.record import Block, GpuState, Record

MOST_THROTTLED = 0.01
"""Share of a session for which a policy may have held the clocks down."""
MOST_WARMING = 15.0
"""Kelvin between the first third of a session and the last."""
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def quiet_machine(record: Record) -> Iterator[Finding]:
    """More runnable threads than CPUs means that others took part of the time."""
    cpus = None if record.environment is None else record.environment.cpu_count
    loads = [block.load_average[0] for block in record.blocks if block.load_average is not None]
    loads += [
        look.load_average
        for block in record.blocks
        for look in block.telemetry
        if look.load_average is not None
    ]
    if cpus and loads and max(loads) > cpus:
        yield Finding(False, "machine_loaded", f"load average {max(loads):.1f} on {cpus} CPUs")


def steady_pace(record: Record) -> Iterator[Finding]:
    """A fixed piece of work takes as long at the end of a session as at its beginning."""
    for block in record.blocks:
        if any(turn.yardstick is not None and turn.yardstick <= 0 for turn in block.turns):
            detail = "the yardstick, which every comparison divides by, took no time"
            yield Finding(True, "zero_duration", detail)
            continue
        drift = change(paces(block))
        if drift is not None and abs(drift) > LARGEST_DRIFT:
            detail = f"the machine's own pace changed by {drift:+.0%} within the session"
            yield Finding(False, "machine_drift", detail)


def _by_gpu(block: Block) -> dict[str, list[tuple[float, GpuState]]]:
    """Looks at each GPU, with their time."""
    looks: dict[str, list[tuple[float, GpuState]]] = {}
    for look in block.telemetry:
        for gpu in look.gpus:
            looks.setdefault(gpu.device, []).append((look.seconds, gpu))
    return looks


def unthrottled(record: Record) -> Iterator[Finding]:
    """The clocks were not held down.

    Heat is fatal: how much it takes depends on the minutes before. A power limit is a property of
    the board that every run on it shares: it is said, and the rows stay usable.
    """
    for block in record.blocks:
        for looks in _by_gpu(block).values():
            (began, first), (ended, last) = looks[0], looks[-1]
            for policy in sorted(first.throttled_seconds.keys() & last.throttled_seconds.keys()):
                grown = last.throttled_seconds[policy] - first.throttled_seconds[policy]
                if grown > MOST_THROTTLED * max(ended - began, 0.0):
                    detail = f"the {policy} policy held a GPU's clocks down for {grown:.3g} s"
                    if policy == "power" and last.power_limit_watts is not None:
                        detail += f" (limit {last.power_limit_watts:.0f} W)"
                    yield Finding(policy == "thermal", "throttled", detail)
            seen = sorted({reason for _, gpu in looks for reason in gpu.throttle})
            if seen:
                detail = f"a GPU gave reasons for less than its full clock: {', '.join(seen)}"
                yield Finding(False, "throttled", detail)


def alone_on_gpu(record: Record) -> Iterator[Finding]:
    """Another process on the GPU takes time, memory and energy that nobody can subtract."""
    for block in record.blocks:
        for looks in _by_gpu(block).values():
            most = max(gpu.foreign_processes or 0 for _, gpu in looks)
            if most > 0:
                detail = f"{most} process(es) of others were on the GPU"
                yield Finding(True, "foreign_process", detail)


def steady_gpu(record: Record) -> Iterator[Finding]:
    """Clock and temperature at the end are those of the beginning.

    The first look is left out: it sees the GPU before its first work. The CPU's clock is not
    judged, a look at a moment says little about it; the yardstick times what it is good for.
    """
    for block in record.blocks:
        for looks in _by_gpu(block).values():
            states = [gpu for _, gpu in looks[1:]]
            clocks = [gpu.sm_clock_mhz for gpu in states if gpu.sm_clock_mhz is not None]
            drift = change(clocks)
            if drift is not None and abs(drift) > LARGEST_DRIFT:
                yield Finding(False, "clock_drift", f"the GPU's clock changed by {drift:+.0%}")
            heat = [gpu.temperature_c for gpu in states if gpu.temperature_c is not None]
            if (rise := _difference(heat)) is not None and abs(rise) > MOST_WARMING:
                yield Finding(
                    False, "temperature_drift", f"the GPU's temperature changed by {rise:+.0f} °C"
                )


def _difference(values: Sequence[float]) -> float | None:
    third = max(2, len(values) // 3)
    if len(values) < 2 * third:
        return None
    return median(values[-third:]) - median(values[:third])


def thread_count(record: Record) -> Iterator[Finding]:
    """The libraries were told the number of threads that the record names, and the CPUs suffice."""
    threads = None if record.device is None else record.device.threads
    if threads is None or record.environment is None:
        return
    for name in _COUNTS:
        told = record.environment.variables.get(name)
        if told is not None and told != str(threads):
            detail = f"{name} was {told}, the protocol asks for {threads}"
            yield Finding(False, "threads_mismatch", detail)
    cpus = record.environment.cpu_count
    if cpus is not None and threads > cpus:
        yield Finding(False, "threads_mismatch", f"{threads} threads on {cpus} CPUs")
