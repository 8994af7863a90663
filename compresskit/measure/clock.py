"""Turn a generator of chunks into arrival times.

The decode loop knows no clock; `trace` wraps `next()`. Before each reading the device is
synchronised, so an asynchronous launch can never be mistaken for finished work. The garbage
collector is off inside the window and back to its old state after it.
"""

from __future__ import annotations

import gc
import hashlib
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from compresskit.measure import contention
from compresskit.record import Arrival, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.system import Chunk


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the garbage collector out of a timed window."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def settled() -> Iterator[None]:
    """Tell the garbage collector that what exists now is here to stay.

    With a model's libraries loaded, one collection looks at a million objects: 0.2 s before every
    window, and caches full of them. Frozen objects are not looked at.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trace(
    start: Callable[[], Iterator[Chunk]],
    *,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Time every chunk of one request (the latency probe); `forwards` is left to the caller.

    Tokens are counted per row: the longest row of a chunk.
    """
    times: list[float] = []
    chunks: list[Chunk] = []
    with quiet(), contention.watch() as waiting:
        synchronize()
        began = clock()
        for chunk in start():
            synchronize()
            times.append(clock() - began)
            chunks.append(chunk)
    arrivals = tuple(
        Arrival(seconds, int(chunk.lengths.max()))
        for seconds, chunk in zip(times, chunks, strict=True)
    )
    return _sample(arrivals, chunks, waiting.seconds)


def span(
    start: Callable[[], Iterator[Chunk]],
    *,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Time the first chunk and the end only (the throughput probe): the device may run ahead.

    The two arrivals hold the tokens per row of the first chunk and of all later ones.
    """
    with quiet(), contention.watch() as waiting:
        synchronize()
        began = clock()
        chunks = start()
        first = next(chunks)
        synchronize()
        first_at = clock() - began
        later = list(chunks)
        synchronize()
        last_at = clock() - began
    # Lengths are read after the window: on a GPU reading them would wait for the device.
    head = Arrival(first_at, int(first.lengths.max()))
    rest = sum(int(chunk.lengths.max()) for chunk in later)
    arrivals = (head, Arrival(last_at, rest)) if later else (head,)
    return _sample(arrivals, [first, *later], waiting.seconds)


def _sample(arrivals: tuple[Arrival, ...], chunks: list[Chunk], waited: float | None) -> Sample:
    return Sample(
        arrivals=arrivals,
        forwards=0,
        drafted=sum(chunk.drafted for chunk in chunks),
        accepted=sum(chunk.accepted for chunk in chunks),
        waited=waited,
        tokens_sha256=_digest(chunks),
    )


def _digest(chunks: list[Chunk]) -> str:
    """First 16 hex digits of the hash of what each row was given, however it was cut into chunks."""
    rows: list[list[int]] = [[] for _ in chunks[0].lengths] if chunks else []
    for chunk in chunks:
        for row, ids, length in zip(
            rows, chunk.tokens.tolist(), chunk.lengths.tolist(), strict=True
        ):
            row.extend(ids[:length])
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
