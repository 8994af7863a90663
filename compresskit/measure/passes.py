"""The speed passes, and the workload that all passes share.

Every repetition has its own prompt, so no cache of any kind can answer for the model, and the
warm-up has the measured shapes. Output length is fixed: the stop token is ignored.

The speed passes are taken in turns, so that several artefacts can be measured in alternation:
`Speed.warm` once, then `Speed.turn` for the i-th sample of every pass, then `Speed.result`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from compresskit.decode import pad
from compresskit.device import synchronizer
from compresskit.measure import clock
from compresskit.measure.count import counting
from compresskit.record import LatencyPass, Sample, ThroughputPass
from compresskit.system import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from compresskit.spec import ProtocolSpec, SamplingSpec, WorkloadSpec
    from compresskit.system import System


@dataclass(frozen=True)
class Bench:
    """A system with its workload: what all passes share."""

    system: System
    prompts: Sequence[list[int]]
    """Token ids, one list per request; consumed in order and started again when used up."""
    workload: WorkloadSpec
    protocol: ProtocolSpec
    sampling: SamplingSpec
    seed: int
    tick: Callable[[str, str], None] = lambda phase, detail: None
    """Told before each repetition, for progress: the pass, and which repetition."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt: of all of them, or the mean where they have lengths of their own."""
        return round(sum(map(len, self.prompts)) / len(self.prompts))

    def request(self, index: int, batch: int, new_tokens: int | None = None) -> Request:
        """The `index`-th request of `batch` rows."""
        rows = [
            list(self.prompts[(index * batch + row) % len(self.prompts)]) for row in range(batch)
        ]
        tokens, mask = pad(rows, device=self.system.device.torch)
        return Request(
            tokens=tokens,
            mask=mask,
            max_new_tokens=new_tokens or self.workload.new_tokens,
            sampling=self.sampling,
            seed=self.seed + index,
        )

    def timed(self, probe: Literal["trace", "span"], index: int, batch: int) -> Sample:
        """One repetition under the clock."""
        system, counter = counting(self.system)
        request = self.request(index, batch)
        wait = synchronizer(system.device)
        parts = clock.Parts(synchronize=wait)
        if probe == "trace":
            system = replace(system, during=parts.during)
        measure = clock.trace if probe == "trace" else clock.span
        sample = measure(lambda: system.generate(request), synchronize=wait)
        found: dict[str, Any] = {"forwards": counter.calls, "parts": parts.stored()}
        if request.mask is not None or request.tokens.shape[-1] != self.workload.prompt_tokens:
            real = request.tokens.numel() if request.mask is None else int(request.mask.sum())
            found["prompt_tokens"] = real / batch
        return sample.model_copy(update=found)


@dataclass
class _Series:
    """Warm-ups and samples of one probe at one batch size."""

    probe: Literal["trace", "span"]
    batch: int
    warmups: list[Sample] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    reason: str | None = None
    """Why this batch size is not run (any more)."""

    def shape(self, workload: WorkloadSpec) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "prompt_tokens": workload.prompt_tokens,
            "new_tokens": workload.new_tokens,
            "warmups": tuple(self.warmups),
            "samples": tuple(self.samples),
        }


class Speed:
    """The latency and throughput passes of one artefact, one turn at a time.

    latency      first batch size, a synchronisation at each chunk: TTFT, TPOT, ITL
    throughput   every batch size, synchronised after the first chunk and at the end
    """

    def __init__(self, bench: Bench, *, latency: bool, throughput: bool, batched: bool) -> None:
        """Plan the passes; without `batched` (one sequence at a time) larger sizes hold the reason."""
        self.bench = bench
        sizes = sorted(bench.workload.batch_sizes)
        first = bench.workload.batch_sizes[0]
        self._latency = _Series("trace", first) if latency else None
        self._throughput = [_Series("span", size) for size in sizes] if throughput else None
        for series in self._throughput or ():
            if series.batch > 1 and not batched:
                series.reason = "the stack decodes one sequence at a time"

    def warm(self) -> None:
        """Take the warm-ups of every pass."""
        for index in range(self.bench.protocol.warmups):
            self._go(index, "warmups")

    def turn(self, index: int) -> None:
        """Take the `index`-th sample of every pass."""
        self._go(self.bench.protocol.warmups + index, "samples")

    def _go(self, index: int, kept: Literal["warmups", "samples"]) -> None:
        if self._latency is not None:
            getattr(self._latency, kept).append(self._timed(self._latency, index))
        for series in self._throughput or ():
            if series.reason is not None:
                continue
            try:
                getattr(series, kept).append(self._timed(series, index))
            except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._give_up(series.batch)

    def _timed(self, series: _Series, index: int) -> Sample:
        phase = "latency" if series.probe == "trace" else "throughput"
        self.bench.tick(phase, f"batch {series.batch}, repetition {index + 1}")
        return self.bench.timed(series.probe, index, series.batch)

    def _give_up(self, batch: int) -> None:
        """A size that does not fit is recorded as such, and larger ones are not tried."""
        for series in self._throughput or ():
            if series.batch >= batch and series.reason is None:
                series.reason = f"batch {batch} does not fit into memory"
                series.samples.clear()

    def result(self) -> dict[str, Any]:
        """The passes as a record stores them, by name."""
        done: dict[str, Any] = {}
        workload = self.bench.workload
        if self._latency is not None:
            done["latency"] = LatencyPass(**self._latency.shape(workload))
        if self._throughput is not None:
            done["throughput"] = tuple(
                ThroughputPass(**series.shape(workload), reason=series.reason)
                for series in self._throughput
            )
        return done


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch's CPU allocator raises a plain RuntimeError; its text is all there is to go by."""
    return isinstance(
        error, torch.cuda.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)
