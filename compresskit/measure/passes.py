"""The speed, memory and energy passes: each looks at one thing.

Every repetition has its own prompt, so no cache of any kind can answer for the model, and the
warm-up has the measured shapes. Output length is fixed: the stop token is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from compresskit.decode import pad
from compresskit.device import synchronizer
from compresskit.hf.cache import cache_bytes
from compresskit.measure import clock, counters, energy
from compresskit.measure.count import counting
from compresskit.measure.memory import PeakMeter, weight_bytes
from compresskit.record import EnergyPass, LatencyPass, MemoryPass, Reading, Sample, ThroughputPass
from compresskit.system import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from compresskit.spec import ProtocolSpec, SamplingSpec, WorkloadSpec
    from compresskit.system import Chunk, NewCache, System


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
    tick: Callable[[str], None] = lambda text: None
    """Told before each repetition, for progress."""

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
        measure = clock.trace if probe == "trace" else clock.span
        sample = measure(lambda: system.generate(request), synchronize=synchronizer(system.device))
        return sample.model_copy(update={"forwards": counter.calls})

    def series(
        self, probe: Literal["trace", "span"], batch: int
    ) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
        """Warm-ups and samples of one batch size."""
        taken: list[Sample] = []
        for index in range(self.protocol.warmups + self.protocol.repeats):
            self.tick(f"batch {batch}, repetition {index + 1}")
            taken.append(self.timed(probe, index, batch))
        return tuple(taken[: self.protocol.warmups]), tuple(taken[self.protocol.warmups :])


def latency(bench: Bench) -> LatencyPass:
    """First batch size, a synchronisation at each chunk: TTFT, TPOT, ITL."""
    batch = bench.workload.batch_sizes[0]
    warmups, samples = bench.series("trace", batch)
    return LatencyPass(
        batch=batch,
        prompt_tokens=bench.workload.prompt_tokens,
        new_tokens=bench.workload.new_tokens,
        warmups=warmups,
        samples=samples,
    )


def throughput(bench: Bench, *, batched: bool) -> tuple[ThroughputPass, ...]:
    """Every batch size, synchronised after the first chunk and at the end.

    With `batched` False (the stack decodes one sequence at a time), larger sizes hold the reason.
    A size that does not fit into memory is recorded as such and larger ones are not tried.
    """
    passes: list[ThroughputPass] = []
    too_large: str | None = None
    for batch in sorted(bench.workload.batch_sizes):
        shape = {
            "batch": batch,
            "prompt_tokens": bench.workload.prompt_tokens,
            "new_tokens": bench.workload.new_tokens,
        }
        reason = too_large
        if batch > 1 and not batched:
            reason = "the stack decodes one sequence at a time"
        if reason is not None:
            passes.append(ThroughputPass(**shape, reason=reason))
            continue
        try:
            warmups, samples = bench.series("span", batch)
        except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            too_large = f"batch {batch} does not fit into memory"
            passes.append(ThroughputPass(**shape, reason=too_large))
            continue
        passes.append(ThroughputPass(**shape, warmups=warmups, samples=samples))
    return tuple(passes)


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch's CPU allocator raises a plain RuntimeError; its text is all there is to go by."""
    return isinstance(
        error, torch.cuda.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)


@dataclass
class _Watched:
    """Keeps hold of the cache that the loop makes, so that it can be weighed at the end."""

    inner: NewCache
    caches: list[Any] = field(default_factory=list)

    def __call__(self, capacity: int) -> Any:
        cache = self.inner(capacity)
        self.caches.append(cache)
        return cache


def memory(bench: Bench, *, peaks: dict[str, Reading], parameters: int) -> MemoryPass:
    """Weights, cache and peaks; `peaks` holds those of earlier windows (load, apply)."""
    batch = bench.workload.batch_sizes[0]
    meter = PeakMeter(bench.system.device)
    windows = dict(peaks)
    watched = _Watched(bench.system.new_cache)
    system = replace(bench.system, new_cache=watched)
    meter.start()
    chunks: Iterator[Chunk] = system.generate(bench.request(0, batch))
    seen = bench.workload.prompt_tokens + int(next(chunks).lengths.max())
    windows.update({f"{name}/prefill": value for name, value in meter.read().items()})
    meter.start()
    for chunk in chunks:
        seen += int(chunk.lengths.max())
    windows.update({f"{name}/decode": value for name, value in meter.read().items()})
    return MemoryPass(
        batch=batch,
        # The last token has been emitted but never fed back.
        tokens_in_cache=seen - 1,
        weights_bytes=weight_bytes(system.model),
        parameters=parameters,
        cache_bytes=sum(cache_bytes(cache) for cache in watched.caches),
        peaks=windows,
    )


def energy_pass(bench: Bench) -> EnergyPass:
    """Prefill-only loop and generate loop, each in a window of its own."""
    counter = counters.find(bench.system.device)
    batch = bench.workload.batch_sizes[0]
    index = 0

    def run(new_tokens: int) -> int:
        nonlocal index
        index += 1
        request = bench.request(index, batch, new_tokens)
        return sum(int(chunk.lengths.sum()) for chunk in bench.system.generate(request))

    def prefill() -> int:
        return run(1) * bench.workload.prompt_tokens

    def generate() -> int:
        return run(bench.workload.new_tokens)

    wait = synchronizer(bench.system.device)
    seconds = bench.protocol.energy_seconds
    return EnergyPass(
        prefill=energy.meter(prefill, counter, seconds=seconds, synchronize=wait),
        generate=energy.meter(generate, counter, seconds=seconds, synchronize=wait),
        batch=batch,
        prompt_tokens=bench.workload.prompt_tokens,
        new_tokens=bench.workload.new_tokens,
    )
