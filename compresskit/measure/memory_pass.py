"""The memory pass: one request, watched from the first token to the last."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compresskit.hf.cache import cache_bytes
from compresskit.measure.memory import PeakMeter, weight_bytes
from compresskit.record import MemoryPass, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from compresskit.measure.passes import Bench
    from compresskit.system import Chunk, NewCache


@dataclass
class _Watched:
    """Keeps hold of the cache that the loop makes, so that it can be weighed at the end."""

    inner: NewCache
    caches: list[Any] = field(default_factory=list)

    def __call__(self, capacity: int) -> Any:
        cache = self.inner(capacity)
        self.caches.append(cache)
        return cache


def memory_pass(bench: Bench, *, phases: Mapping[str, Phase], parameters: int) -> MemoryPass:
    """Weights, cache and peaks; `phases` holds the earlier windows (load, compress)."""
    batch = bench.workload.batch_sizes[0]
    meter = PeakMeter(bench.system.device)
    windows = dict(phases)
    watched = _Watched(bench.system.new_cache)
    system = replace(bench.system, new_cache=watched)
    meter.start()
    chunks: Iterator[Chunk] = system.generate(bench.request(0, batch))
    seen = bench.workload.prompt_tokens + int(next(chunks).lengths.max())
    windows["prefill"] = Phase(peaks=meter.read())
    meter.start()
    for chunk in chunks:
        seen += int(chunk.lengths.max())
    windows["decode"] = Phase(peaks=meter.read())
    return MemoryPass(
        batch=batch,
        # The last token has been emitted but never fed back.
        tokens_in_cache=seen - 1,
        weights_bytes=weight_bytes(system.model),
        parameters=parameters,
        cache_bytes={"held": sum(cache_bytes(cache) for cache in watched.caches)},
        phases=windows,
    )
