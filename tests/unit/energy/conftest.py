"""A world with a clock of its own, counters that replay a course of energy, a fake `pynvml`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from compresskit.measure.energy import power
from compresskit.measure.energy.counters import AbstractCounter

Course = Callable[[float], float | None]
"""Joules (or watts) at a time; None: the sensor fails."""


def ticking(watts: float, tick: float, *, start: float = 100.0) -> Course:
    """A counter that shows the energy of its last tick."""
    # A hair forward: the time of a tick belongs to it, whatever the last bit of a sum is.
    return lambda now: start + watts * tick * int(now / tick + 1e-6)


class Replayed(AbstractCounter):
    """A counter whose devices follow given courses."""

    source = "replay_counter"
    scope = "gpu"

    def __init__(self, world: World, *courses: Course, watts: Course | None = None) -> None:
        self.world, self.courses, self.sensor = world, courses, watts
        self.devices = tuple(f"device{i}" for i in range(len(courses)))
        self.read = 0

    def parts(self) -> tuple[float, ...] | None:
        self.read += 1
        joules = [course(self.world.now) for course in self.courses]
        return None if None in joules else tuple(joules)

    def watts(self) -> float | None:
        return None if self.sensor is None else self.sensor(self.world.now)

    def reason(self) -> str:
        return "the replay ended"


class World:
    """Time passes only when someone works or pauses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.trace: power.Trace | None = None
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def replay(self, *courses: Course, watts: Course | None = None) -> Replayed:
        return Replayed(self, *courses, watts=watts)

    @contextmanager
    def sampled(self, counter: AbstractCounter):
        """What `power.sampled` does, without a thread: `work` samples as it goes."""
        self.trace = power.Trace(counter, clock=self.clock)
        self.trace.look()
        yield self.trace
        self.trace.look()

    def work(self, seconds: float = 0.3, tokens: int = 8) -> Callable[[], int]:
        """Work of fixed length, sampled three times."""

        def one() -> int:
            for _ in range(3):
                self.now += seconds / 3
                if self.trace is not None:
                    self.trace.look()
            return tokens

        return one


@pytest.fixture
def world() -> World:
    return World()


class FakeNvml:
    """The part of `pynvml` that is used, over boards described as dictionaries.

    A board's entry is a value, a function of no arguments, or an exception to raise.
    """

    NVML_SUCCESS = 0
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_FI_DEV_POWER_AVERAGE = 185
    NVML_PERF_POLICY_POWER = 0
    NVML_PERF_POLICY_THERMAL = 1
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        """As `pynvml` has it."""

    def __init__(self, **boards: dict[str, Any]) -> None:
        self.boards = boards
        self.driver = True

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        for board in self.boards.values():
            if board["uuid"] == uuid:
                return board
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return list(self.boards.values())[index]

    def nvmlDeviceGetUUID(self, board: dict[str, Any]) -> str:
        return str(board["uuid"])

    def answer(self, board: dict[str, Any], key: str) -> Any:
        """The board's entry, or NVML's refusal."""
        if key not in board:
            raise self.NVMLError("Not Supported")
        value = board[key]
        value = value() if callable(value) else value
        if value is None:
            raise self.NVMLError("Unknown Error")
        return value

    def nvmlDeviceGetMigMode(self, board: dict[str, Any]) -> list[int]:
        return [self.answer(board, "mig"), 0]

    def nvmlDeviceGetTotalEnergyConsumption(self, board: dict[str, Any]) -> int:
        return self.answer(board, "millijoules")

    def nvmlDeviceGetFieldValues(self, board: dict[str, Any], fields: list[Any]) -> list[Any]:
        ((field, _scope),) = fields
        watts = board.get({186: "instant", 185: "average"}[field])
        watts = watts() if callable(watts) else watts
        # An unsupported field is no error of the call: it has a return code of its own.
        missing = watts is None
        value = SimpleNamespace(uiVal=999_999 if missing else int(1000 * watts))
        return [SimpleNamespace(nvmlReturn=3 if missing else 0, value=value)]

    def nvmlDeviceGetClockInfo(self, board: dict[str, Any], kind: int) -> int:
        return self.answer(board, {1: "sm", 2: "mem"}[kind])

    def nvmlDeviceGetTemperature(self, board: dict[str, Any], sensor: int) -> int:
        return self.answer(board, "temperature")

    def nvmlDeviceGetEnforcedPowerLimit(self, board: dict[str, Any]) -> int:
        return self.answer(board, "limit")

    def nvmlDeviceGetCurrentClocksEventReasons(self, board: dict[str, Any]) -> int:
        return self.answer(board, "reasons")

    def nvmlDeviceGetViolationStatus(self, board: dict[str, Any], policy: int) -> Any:
        nanoseconds = self.answer(board, {0: "power_ns", 1: "thermal_ns"}[policy])
        return SimpleNamespace(violationTime=nanoseconds, referenceTime=0)

    def nvmlDeviceGetComputeRunningProcesses(self, board: dict[str, Any]) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.answer(board, "pids")]


@pytest.fixture
def fake_nvml() -> type[FakeNvml]:
    return FakeNvml


@pytest.fixture
def tick_course() -> Callable[..., Course]:
    return ticking
