"""One request with every operation looked at: what its peaks consist of.

A moment at which most tensors are alive is looked at closely: which pages are resident, and what
the allocator keeps. A compiled step cannot be looked into operation by operation; there torch's
allocator tells what one step takes, and the moment is the end of the request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compresskit.hf.cache import cache_bytes
from compresskit.measure.memory import accounts
from compresskit.measure.memory.accounts import Instant, measured
from compresskit.measure.memory.activations import LiveTensors, allocated_peak
from compresskit.measure.memory.arrivals import Arrivals
from compresskit.measure.memory.peaks import PeakMeter
from compresskit.record import Reading, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.measure.passes import Bench
    from compresskit.system import Chunk, NewCache

PREFILL, DECODE = "prefill", "decode"


@dataclass
class Caches:
    """Keeps hold of the caches that a loop makes, so that they can be weighed."""

    inner: NewCache
    made: list[Any] = field(default_factory=list)
    arrivals: Arrivals | None = None

    def __call__(self, capacity: int) -> Any:
        """Make a cache, as the system would."""
        cache = self.inner(capacity)
        self.made.append(cache)
        if self.arrivals is not None:
            self.arrivals.listen(cache)
        return cache

    def chunks(self, bench: Bench, batch: int) -> Iterator[Chunk]:
        """Decode the first request of `bench` with such caches."""
        return replace(bench.system, new_cache=self).generate(bench.request(0, batch))

    def held(self) -> dict[str, int]:
        """Bytes of all of them, by what they are."""
        return cache_bytes(*self.made)

    def total(self) -> int:
        """Bytes of all of them."""
        return sum(self.held().values())


@dataclass
class Seen:
    """What the run gave, by phase."""

    tensors: dict[str, dict[str, Reading]] = field(default_factory=dict)
    """Cache and activations, and on a GPU the workspace."""
    at: dict[str, Instant] = field(default_factory=dict)
    """The process at the moment that the parts speak of."""
    high: dict[str, Reading] = field(default_factory=dict)
    """Peak of resident memory in this very run."""
    operations: int | None = None
    """Of the last decode step."""
    arrivals: Arrivals = field(default_factory=Arrivals)
    """What the prompt handed to the cache."""


def watched(bench: Bench, batch: int) -> Seen:
    """Run the first request of `bench`."""
    return _Run(bench).go(batch)


class _Run:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.cuda = bench.system.device.kind == "cuda"
        self.ordinals = bench.system.device.ordinals
        self.compiled = hasattr(bench.system.step, "constants")
        self.seen = Seen()
        self.caches = Caches(bench.system.new_cache, arrivals=self.seen.arrivals)
        self.meter = PeakMeter(bench.system.device)
        self.live = LiveTensors(self._look)
        self.phase = PREFILL

    def go(self, batch: int) -> Seen:
        self.meter.start()
        chunks = self.caches.chunks(self.bench, batch)
        with self.live:
            next(chunks)
        self.seen.arrivals.stop()
        self._close(self.live.peak, self.caches.total())
        self.phase = DECODE
        self.meter.start(release=False)
        self.live.begin()
        decode = self._compiled if self.compiled else self._eager
        peak, largest = decode(chunks)
        self._close(peak, largest)
        return self.seen

    def _eager(self, chunks: Iterator[Chunk]) -> tuple[int | None, int]:
        """Most bytes of live tensors, and of the cache, over all steps."""
        largest = self.caches.total()
        while True:
            before = self.live.operations
            with self.live:
                if next(chunks, None) is None:
                    return self.live.peak, largest
            self.seen.operations = self.live.operations - before
            largest = max(largest, self.caches.total())

    def _compiled(self, chunks: Iterator[Chunk]) -> tuple[int | None, int]:
        """Every step of a static cache is the same, so that one of them tells for all.

        torch.compile refuses to run under a dispatch mode, and a CUDA graph allocates nothing when
        it is replayed.
        """
        peak = None
        if not self.cuda:
            before = self.live.live
            peak = before + allocated_peak(lambda: next(chunks, None))
        for _ in chunks:
            pass
        self._look()
        return peak, self.caches.total()

    def _look(self) -> None:
        if not self.cuda:
            self.seen.at[self.phase] = Instant.now()

    def _close(self, peak: int | None, largest: int) -> None:
        self.seen.high[self.phase] = self.meter.read()["rss"]
        tensors: dict[str, Reading] = {
            "cache": measured(largest, "storage bytes"),
            "activations": Unavailable(reason="a replayed CUDA graph does not tell its tensors")
            if peak is None
            else measured(peak - largest, "tensors alive at most, less the cache"),
        }
        if self.cuda:
            tensors["workspace"] = (
                Unavailable(reason="cuBLAS works in the memory of the CUDA graph")
                if self.compiled
                else accounts.gpu_workspace(self.ordinals)
            )
        self.seen.tensors[self.phase] = tensors
