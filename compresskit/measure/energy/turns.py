"""The energy pass: windows of prefill and of generation, one of each a turn.

Before the first window, once per run: the counter's tick is measured while the device works, and
the loaded machine is metered idle. A window lasts as long as the protocol asks, or as long as a
hundred ticks where that is longer: a short window would only measure the counter. Random pauses
keep windows from falling into step with the ticks.

A machine without a counter runs nothing and says so once. After a window without a reading no
further one of its kind is taken, so that the i-th window is always the i-th turn's.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from compresskit.device import synchronizer
from compresskit.measure.energy import counters, estimate, metering, tick
from compresskit.record import EnergyPass, EnergyWindow, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.measure.energy.counters import AbstractCounter
    from compresskit.measure.passes import Bench

_SETTLE = 1.0
"""Seconds between work and the idle window: clocks fall with a delay."""
_PAUSE = 0.1
"""Longest random pause, where no tick is known."""


class Energy:
    """Energy windows of one artefact, taken in turns like its speed samples."""

    def __init__(
        self,
        bench: Bench,
        *,
        counter: AbstractCounter | None = None,
        measure_tick: Callable[
            [AbstractCounter, Callable[[], object]], float | None
        ] = tick.while_busy,
        pause: Callable[[float], None] = time.sleep,
        meter: Callable[..., EnergyWindow] = metering.meter,
        model: Callable[..., EnergyWindow] = estimate.meter,
    ) -> None:
        """Find the counter that covers the GPUs in use, or the CPU."""
        self.bench = bench
        device = bench.system.device
        # Offloaded weights lie on no GPU between steps: where their products run, the placement says.
        used = {*device.ordinals, *ordinals(bench.system.model)}
        self._counter = counter or counters.find(device, tuple(sorted(used)))
        self._measure_tick, self._pause = measure_tick, pause
        self._meter, self._model = meter, model
        self._wait = synchronizer(bench.system.device)
        self._random = random.Random(bench.seed)
        self._tick: float | None = None
        self._idle: EnergyWindow | None = None
        self._prefill: list[EnergyWindow] = []
        self._generate: list[EnergyWindow] = []
        self._requests = 0

    def turn(self, index: int) -> None:
        """Take the `index`-th window of each kind, as long as the protocol asks for one."""
        if index >= self.bench.protocol.energy_windows:
            return
        if not self._counts():
            self._without_counter()
            return
        if index == 0:
            self._begin()
        for work, windows in (
            (self._one_prefill, self._prefill),
            (self._one_answer, self._generate),
        ):
            if windows and windows[-1].reading.kind == "unavailable":
                continue
            self._pause(self._random.uniform(0, 2 * (self._tick or _PAUSE)))
            windows.append(self._window(work))

    def _counts(self) -> bool:
        return not isinstance(self._counter, counters.Null)

    def _begin(self) -> None:
        if self._counter.cumulates:
            self._tick = self._measure_tick(self._counter, self._one_prefill)
        self._wait()
        self._pause(_SETTLE)
        self._idle = self._window(self._nothing)

    def _window(self, work: Callable[[], int]) -> EnergyWindow:
        return self._meter(
            work,
            self._counter,
            seconds=max(
                self.bench.protocol.energy_seconds, tick.FEWEST_TICKS * (self._tick or 0.0)
            ),
            synchronize=self._wait,
            tick=self._tick,
        )

    def _without_counter(self) -> None:
        """Estimate where that was asked for and a model exists; else say why there is nothing.

        Once: an estimate gets no surer by repetition.
        """
        wanted = self.bench.protocol.estimate_energy
        for work, windows in (
            (self._one_prefill, self._prefill),
            (self._one_answer, self._generate),
        ):
            if windows:
                continue
            if wanted and self.bench.system.device.kind == "cpu":
                windows.append(self._model(work, seconds=self.bench.protocol.energy_seconds))
            else:
                why = self._counter.reason()
                if wanted:
                    why = f"{why}; there is a model for the CPU only, so nothing was estimated"
                windows.append(EnergyWindow(reading=Unavailable(reason=why)))

    def _run(self, new_tokens: int) -> int:
        self._requests += 1
        batch = self.bench.workload.batch_sizes[0]
        request = self.bench.request(self._requests, batch, new_tokens)
        # Lengths are read at the end: on a GPU reading them waits for the device.
        chunks = list(self.bench.system.generate(request))
        return sum(int(chunk.lengths.sum()) for chunk in chunks)

    def _one_prefill(self) -> int:
        return self._run(1) * self.bench.prompt_tokens

    def _one_answer(self) -> int:
        return self._run(self.bench.workload.new_tokens)

    def _nothing(self) -> int:
        self._pause(_PAUSE)
        return 0

    def result(self) -> EnergyPass:
        """The pass as a record stores it."""
        return EnergyPass(
            prefill=tuple(self._prefill),
            generate=tuple(self._generate),
            idle=self._idle,
            batch=self.bench.workload.batch_sizes[0],
            prompt_tokens=self.bench.prompt_tokens,
            new_tokens=self.bench.workload.new_tokens,
        )


def ordinals(model: object) -> tuple[int, ...]:
    """Numbers, as torch counts, of the GPUs that hold a parameter of `model`: all of them are metered."""
    parameters = getattr(model, "parameters", None)
    placed = {
        parameter.device.index or 0
        for parameter in (parameters() if parameters is not None else ())
        if parameter.device.type == "cuda"
    }
    return tuple(sorted(placed)) or (0,)
