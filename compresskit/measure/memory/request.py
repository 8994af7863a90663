"""The memory pass: one request, run twice.

    as it is     peaks by phase, and the cache at the end
    watched      the same tokens again, with every operation looked at (`measure.watched`)

Watching takes memory and time of its own, so peaks come from the first run and what explains them
from the second.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from compresskit.hf import parallel
from compresskit.measure.memory import accounts
from compresskit.measure.memory.accounts import Accounts
from compresskit.measure.memory.moved import cache_traffic, moved_bytes
from compresskit.measure.memory.peaks import PeakMeter
from compresskit.measure.memory.vram import ProcessVram
from compresskit.measure.memory.watched import DECODE, PREFILL, Caches, watched
from compresskit.measure.memory.weights import beside, weight_bytes
from compresskit.record import MemoryPass, Phase, Reading, Unavailable
from compresskit.system import longest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compresskit.measure.passes import Bench


def memory_pass(bench: Bench, *, phases: Mapping[str, Phase], parameters: int) -> MemoryPass:
    """Weights, cache and peaks; `phases` holds the earlier windows (load, compress)."""
    system, batch = bench.system, bench.workload.batch_sizes[0]
    # What the speed passes have left in cycles is not the request's.
    gc.collect()
    plain = _as_it_is(bench, batch)
    seen = watched(bench, batch)
    books = Accounts(
        system.device, plain.context if system.device.kind == "cuda" else _runtime(phases)
    )
    others = beside(system)
    used = {
        name: books.phase(
            plain.peaks[name],
            system.model,
            system.step,
            others,
            tensors=seen.tensors[name],
            at=seen.at.get(name),
            high=seen.high[name],
            slack=plain.slack.get(name),
        )
        for name in (PREFILL, DECODE)
    }
    # Processes that share a model hold a part of the cache each.
    everywhere = partial(parallel.summed, system.facts)
    dense = seen.arrivals.dense(system.model.config, plain.tokens)
    traffic = everywhere(plain.traffic)
    return MemoryPass(
        batch=batch,
        tokens_in_cache=plain.tokens,
        weights_bytes=weight_bytes(system.model, system.step, others),
        parameters=parameters,
        cache_bytes=everywhere(plain.cache),
        drafter_bytes=plain.drafter,
        dense_cache=None if dense is None else everywhere(dense),
        moved_bytes=moved_bytes(system.model, traffic, batch=batch),
        operations_per_step=seen.operations,
        phases={**phases, **used},
    )


def _runtime(phases: Mapping[str, Phase]) -> Reading:
    """What was read before the model was loaded stands in the account of the load."""
    unread = Unavailable(reason="not read before the model was loaded")
    return phases["load"].parts.get("runtime", unread) if "load" in phases else unread


class _AsItIs(NamedTuple):
    """What the run without watching gave."""

    peaks: dict[str, dict[str, Reading]]
    slack: dict[str, Reading]
    """On a GPU: of torch's allocator."""
    context: Reading
    """On a GPU: what the process holds there beside tensors."""
    cache: dict[str, int]
    """Bytes held, by kind."""
    traffic: dict[str, int]
    """Bytes that a step reads of it, by kind."""
    tokens: int
    drafter: int | None
    """Bytes that the drafter of a speculative loop held, where it tells."""


def _as_it_is(bench: Bench, batch: int) -> _AsItIs:
    cuda = bench.system.device.kind == "cuda"
    peaks: dict[str, dict[str, Reading]] = {}
    slack: dict[str, Reading] = {}
    caches = Caches(bench.system.new_cache)
    used = bench.system.device.ordinals
    with ProcessVram(ordinals=used) if cuda else nullcontext() as vram:
        meter = PeakMeter(bench.system.device, vram)

        def close(phase: str) -> None:
            peaks[phase] = meter.read()
            if cuda:
                slack[phase] = accounts.gpu_slack(used)

        meter.start()
        context = (
            Unavailable(reason="no GPU") if vram is None else accounts.gpu_runtime(vram.now(), used)
        )
        told: dict[str, int] = {}
        listening = replace(bench, system=replace(bench.system, tell=told.__setitem__))
        chunks = caches.chunks(listening, batch)
        seen = [next(chunks)]
        close(PREFILL)
        # What the prefill has left in the allocator is there while any process decodes.
        meter.start(release=False)
        seen += chunks
        close(DECODE)
    # The last token has been emitted but never fed back.
    traffic = cache_traffic(*caches.made)
    tokens = bench.request(0, batch).tokens.shape[-1] + longest(seen)[-1] - 1
    drafter = told.get("drafter_bytes")
    return _AsItIs(peaks, slack, context, caches.held(), traffic, tokens, drafter)
