"""The energy pass: windows of prefill and of generation, one of each a turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.device import synchronizer
from compresskit.measure import counters, energy
from compresskit.record import EnergyPass, EnergyWindow

if TYPE_CHECKING:
    from compresskit.measure.passes import Bench


class Energy:
    """Energy windows of one artefact, taken in turns like its speed samples."""

    def __init__(self, bench: Bench) -> None:
        """Find the counter that covers the device."""
        self.bench = bench
        self._counter = counters.find(bench.system.device)
        self._wait = synchronizer(bench.system.device)
        self._prefill: list[EnergyWindow] = []
        self._generate: list[EnergyWindow] = []
        self._requests = 0

    def turn(self, index: int) -> None:
        """Take the `index`-th window of each kind, as long as the protocol asks for one."""
        if index >= self.bench.protocol.energy_windows:
            return
        for work, windows in (
            (self._one_prefill, self._prefill),
            (self._one_answer, self._generate),
        ):
            # A machine without a counter says so once.
            if windows and windows[-1].reading.kind == "unavailable":
                continue
            windows.append(
                energy.meter(
                    work,
                    self._counter,
                    seconds=self.bench.protocol.energy_seconds,
                    synchronize=self._wait,
                )
            )

    def _run(self, new_tokens: int) -> int:
        self._requests += 1
        batch = self.bench.workload.batch_sizes[0]
        request = self.bench.request(self._requests, batch, new_tokens)
        return sum(int(chunk.lengths.sum()) for chunk in self.bench.system.generate(request))

    def _one_prefill(self) -> int:
        return self._run(1) * self.bench.workload.prompt_tokens

    def _one_answer(self) -> int:
        return self._run(self.bench.workload.new_tokens)

    def result(self) -> EnergyPass:
        """The pass as a record stores it."""
        return EnergyPass(
            prefill=tuple(self._prefill),
            generate=tuple(self._generate),
            batch=self.bench.workload.batch_sizes[0],
            prompt_tokens=self.bench.workload.prompt_tokens,
            new_tokens=self.bench.workload.new_tokens,
        )
