"""State of the machine beside the samples: load, clocks, temperature, throttling, other processes.

A look is taken between timed windows, never within one. Whatever the system does not tell is
null: a container that hides its clocks is no evidence for or against a run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from compresskit.measure import environment
from compresskit.measure.nvml import Gpu, open_gpus, power_watts
from compresskit.record import GpuState, Telemetry
from compresskit.stats import median

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.device import Device

_REASONS = {
    "power_cap": 0x04,
    "hw_slowdown": 0x08,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "power_brake": 0x80,
}
"""Bits of NVML's clocks event reasons that mean less speed; the others (idle, user's clocks) do not."""
_POLICIES = {"power": "NVML_PERF_POLICY_POWER", "thermal": "NVML_PERF_POLICY_THERMAL"}
_CPUS = Path("/sys/devices/system/cpu")
_MOST_CPUS = 8
"""Reading the clock of a CPU can wake it: a few stand for all."""


class Watch:
    """Looks at the machine when told to, between the timed windows and never within one."""

    def __init__(
        self,
        device: Device,
        *,
        gpus: tuple[Gpu, ...] | str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin the session's time; `gpus` are those of `device`, unless given."""
        if gpus is None:
            gpus = open_gpus(device.ordinals) if device.kind == "cuda" else ()
        self.device = device
        self._gpus = () if isinstance(gpus, str) else gpus
        self._clock = clock
        self._began = clock()
        self._seen: list[Telemetry] = []

    def look(self) -> None:
        """Take one snapshot."""
        load = environment.load_average()
        self._seen.append(
            Telemetry(
                seconds=self._clock() - self._began,
                load_average=None if load is None else load[0],
                cpu_mhz=cpu_mhz(),
                gpus=tuple(state(gpu) for gpu in self._gpus),
            )
        )

    def seen(self) -> tuple[Telemetry, ...]:
        """Every snapshot so far, in order."""
        return tuple(self._seen)


def cpu_mhz(root: Path = _CPUS) -> float | None:
    """Clock of the CPUs that this process may use, the median; None where nobody tells."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    files = [root / f"cpu{cpu}" / "cpufreq" / "scaling_cur_freq" for cpu in allowed[:_MOST_CPUS]]
    try:
        return median([int(file.read_text()) / 1000 for file in files])
    except (OSError, ValueError):
        pass
    try:
        told = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError):
        return None
    return None if told is None or not told.current else float(told.current)


def state(gpu: Gpu) -> GpuState:
    """What NVML says about `gpu` now."""
    nvml = gpu.nvml
    reasons = gpu.ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # the name of the call before driver 535
        reasons = gpu.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    limit = gpu.ask("nvmlDeviceGetEnforcedPowerLimit")
    return GpuState(
        device=gpu.device,
        sm_clock_mhz=gpu.ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        memory_clock_mhz=gpu.ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        temperature_c=gpu.ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        power_watts=power_watts(gpu),
        power_limit_watts=None if limit is None else limit / 1000,
        throttle=tuple(name for name, bit in _REASONS.items() if (reasons or 0) & bit),
        throttled_seconds=_violations(gpu),
        foreign_processes=foreign_processes(gpu.ask("nvmlDeviceGetComputeRunningProcesses")),
    )


def _violations(gpu: Gpu) -> dict[str, float]:
    """Seconds for which a policy has held the clocks down, since the driver was loaded."""
    seconds = {}
    for name, policy in _POLICIES.items():
        answer = gpu.ask("nvmlDeviceGetViolationStatus", getattr(gpu.nvml, policy))
        if answer is not None:
            seconds[name] = answer.violationTime / 1e9
    return seconds


def foreign_processes(
    running: Any, *, parent: Callable[[int], int | None] | None = None
) -> int | None:
    """How many of the processes on a GPU are not of this session; None where that cannot be told.

    Ours are this process, its parent, its children, and the children of its parent: the sides of
    an interleaved session are all started by one process. In a container NVML may list the
    process numbers of the host: a list without this very process says nothing about the others.
    """
    numbers = {one.pid for one in running or ()}
    me, mother = os.getpid(), os.getppid()
    if me not in numbers:
        return None
    of = parent or _parent
    kin = {me, mother} if mother > 1 else {me}
    return sum(number not in kin and of(number) not in kin for number in numbers)


def _parent(number: int) -> int | None:
    """Parent of a process; None where it has gone or cannot be seen."""
    try:
        return int(psutil.Process(number).ppid())
    except psutil.Error:
        return None
