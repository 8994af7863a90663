"""Time on a GPU: a CUDA graph of many calls, replayed; and the bandwidth they are held against.

Inside a graph no call waits for Python or for the launch of its neighbours, which is how a serving
engine runs them and the only way to time a kernel of a few microseconds. All samples are kept: one
is the mean time of a call in one replay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROTATED_BYTES = 200_000_000
"""Copies of the weights add up to this: four times the 50 MB second-level cache of an H100."""
MOST_COPIES = 64
GRAPH_SECONDS = 2e-3
"""Least duration of one replay, so that the events' resolution does not matter."""
REPLAYS = 20


class Timing(NamedTuple):
    """Seconds of one call, one sample a replay."""

    samples: tuple[float, ...]
    calls_per_sample: int
    graph: bool


def copies(bytes_each: int) -> int:
    """How many copies of `bytes_each` defeat the cache; at least two, at most `MOST_COPIES`."""
    return min(MOST_COPIES, max(2, -(-ROTATED_BYTES // max(1, bytes_each))))


def measure(calls: Sequence[Callable[[], object]]) -> Timing:
    """Time the calls one after the other, as often as fills a replay."""
    for call in calls:  # compiles, tunes and allocates, none of which a graph may do
        call()
    torch.cuda.synchronize()
    rounds = max(1, round(GRAPH_SECONDS / max(1e-9, _seconds(calls, 1) * len(calls))))
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        replay: Callable[[], None] = graph.replay
    except RuntimeError:  # synchronises or allocates by itself: some libraries do
        torch.cuda.synchronize()
        samples = tuple(_seconds(calls, rounds) for _ in range(REPLAYS))
        return Timing(samples, rounds * len(calls), graph=False)
    replay()
    torch.cuda.synchronize()
    samples = tuple(_seconds([replay], 1) / (rounds * len(calls)) for _ in range(REPLAYS))
    return Timing(samples, rounds * len(calls), graph=True)


def _seconds(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """Mean seconds of a call, between two events."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(rounds):
        for call in calls:
            call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / (rounds * len(calls))


def copy_bandwidth(byte_count: int = 1 << 30) -> tuple[float, ...]:
    """Bytes per second of copying, read and written ones both counted; one sample a replay."""
    source = torch.randint(256, (byte_count,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)])
    return tuple(2 * byte_count / seconds for seconds in timing.samples)
