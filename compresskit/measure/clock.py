"""Turn a generator of chunks into arrival times.

The decode loop knows no clock; `trace` wraps `next()`. Before each reading the device is
synchronised, so an asynchronous launch can never be mistaken for finished work. The garbage
collector is off inside the window and back to its old state after it.
"""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

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


def trace(
    start: Callable[[], Iterator[Chunk]],
    *,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Time every chunk of one request (the latency probe); `forwards` is left to the caller.

    Tokens are counted per row: the longest row of a chunk.
    """
    arrivals: list[Arrival] = []
    drafted = accepted = 0
    with quiet():
        synchronize()
        began = clock()
        for chunk in start():
            synchronize()
            now = clock()
            arrivals.append(Arrival(now - began, int(chunk.lengths.max())))
            drafted += chunk.drafted
            accepted += chunk.accepted
    return Sample(arrivals=tuple(arrivals), forwards=0, drafted=drafted, accepted=accepted)


def span(
    start: Callable[[], Iterator[Chunk]],
    *,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Time the first chunk and the end only (the throughput probe): the device may run ahead.

    The two arrivals hold the tokens per row of the first chunk and of all later ones.
    """
    with quiet():
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
    both = (first, *later)
    return Sample(
        arrivals=(head, Arrival(last_at, rest)) if later else (head,),
        forwards=0,
        drafted=sum(chunk.drafted for chunk in both),
        accepted=sum(chunk.accepted for chunk in both),
    )
