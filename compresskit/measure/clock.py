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
from compresskit.system import longest

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


class Parts:
    """Seconds of the parts that a loop says its steps have (`System.during`), in order.

    The device is synchronised at both edges. The loops wait for the device between their parts
    anyway, to learn what was accepted, so that on a GPU as well this costs microseconds.
    """

    def __init__(
        self,
        *,
        synchronize: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start with none."""
        self.synchronize, self.clock = synchronize, clock
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Time one part; what fails is not counted."""
        self.synchronize()
        began = self.clock()
        yield
        self.synchronize()
        self.seconds.setdefault(part, []).append(self.clock() - began)

    def stored(self) -> dict[str, tuple[float, ...]] | None:
        """As a sample keeps them; None of a loop without parts."""
        return {part: tuple(spent) for part, spent in self.seconds.items()} or None


def trace(
    start: Callable[[], Iterator[Chunk]],
    *,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Time every chunk of one request (the latency probe); `forwards` is left to the caller.

    Tokens are counted per row: what the longest row has grown by.
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
    totals = longest(chunks)
    arrivals = tuple(
        Arrival(seconds, after - before)
        for seconds, after, before in zip(times, totals, [0, *totals], strict=False)
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
    totals = longest([first, *later])
    head = Arrival(first_at, totals[0])
    arrivals = (head, Arrival(last_at, totals[-1] - totals[0])) if later else (head,)
    return _sample(arrivals, [first, *later], waiting.seconds)


def _sample(arrivals: tuple[Arrival, ...], chunks: list[Chunk], waited: float | None) -> Sample:
    steps = _per_step(chunks)
    return Sample(
        arrivals=arrivals,
        forwards=0,
        drafted=sum(chunk.drafted for chunk in chunks),
        accepted=sum(chunk.accepted for chunk in chunks),
        waited=waited,
        tokens_sha256=_digest(chunks),
        per_step_drafted=steps and tuple(tuple(d for d, _ in row) for row in steps),
        per_step_accepted=steps and tuple(tuple(a for _, a in row) for row in steps),
    )


def _per_step(chunks: list[Chunk]) -> list[list[tuple[int, int]]] | None:
    """Drafted and accepted tokens of each row, chunk by chunk while the row is given tokens.

    None where no chunk speaks of drafts.
    """
    if not any(chunk.drafts for chunk in chunks):
        return None
    rows: list[list[tuple[int, int]]] = [[] for _ in chunks[0].lengths]
    for chunk in chunks:
        drafts = chunk.drafts or ((0, 0),) * len(rows)
        for row, draft, length in zip(rows, drafts, chunk.lengths.tolist(), strict=True):
            if length:
                row.append(draft)
    return rows


def _digest(chunks: list[Chunk]) -> str:
    """First 16 hex digits of the hash of what each row was given, however it was cut into chunks."""
    rows: list[list[int]] = [[] for _ in chunks[0].lengths] if chunks else []
    for chunk in chunks:
        for row, ids, length in zip(
            rows, chunk.tokens.tolist(), chunk.lengths.tolist(), strict=True
        ):
            row.extend(ids[:length])
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
