"""What a pass over several tokens costs, beside a pass over one: the v(k) of the cost model.

    prompt ──prefill──► cache of S tokens ──pass of n tokens──► time ──crop──► cache of S tokens

The widths take turns in shuffled rounds, so that a machine that slows down slows all of them down.
One round more comes first and is not kept: it pays for what is built at first use. A step that is
built for fixed widths is asked for these only, since the loop fills its blocks up to them.

What drafting and the host cost is not probed width by width: the parts of real steps tell it
(`measure.clock.Parts`), those of the latency pass or, where the costs are wanted before any pass,
those of a trial request.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from compresskit.device import synchronizer
from compresskit.hf.cache import enable_rollback, roll_back
from compresskit.measure import clock, contention
from compresskit.record import StepCosts

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.record import Sample
    from compresskit.system import Request, System

ROUNDS = 7
"""Timings of each width; their median is what counts."""
DENSE = 8
"""Up to this width all are timed, beyond it every fourth: v bends where kernels change, and that is
among the first."""


def widths(system: System) -> list[int]:
    """The widths worth timing: from one token to the widest pass that the loop asks for."""
    most = max(system.widths)
    if system.fixed_widths:
        return sorted({1, *system.widths})
    return sorted({*range(1, min(most, DENSE) + 1), *range(DENSE, most + 1, 4), most})


@torch.inference_mode()
def probe(
    system: System,
    request: Request,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    trial: bool = False,
    timer: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """Time passes of `system` on a cache of the prompt of `request`; `trial`: decode it as well.

    The cache has the capacity that decoding `request` would ask for, so that a compiled step is
    built for shapes that are used again.
    """
    known = widths(system)
    wait, rng = synchronizer(system.device), random.Random(seed)
    tokens = system.prompt(request.tokens)
    capacity = tokens.shape[1] + request.max_new_tokens + max(system.widths)
    spent: dict[int, list[float]] = {width: [] for width in known}
    waited: dict[int, list[float | None]] = {width: [] for width in known}
    with system.attached():
        cache = system.new_cache(capacity)
        system.step(tokens, cache)
        enable_rollback(cache)
        for number in range(rounds + 1):
            for width in rng.sample(known, len(known)):
                block = tokens[:, :1].repeat(1, width)
                # Decoding takes one pass after the other: the first of two warms up for this width.
                for _ in range(2):
                    seconds, queued = _timed(system, block, cache, wait, timer)
                    roll_back(cache, width)
                if number:
                    spent[width].append(seconds)
                    waited[width].append(queued)
    queues = tuple(tuple(q for q in waited[width] if q is not None) for width in known)
    return StepCosts(
        batch=tokens.shape[0],
        tokens_in_cache=tokens.shape[1],
        widths=tuple(known),
        padded=system.fixed_widths,
        seconds=tuple(tuple(spent[width]) for width in known),
        waited=queues if all(len(queue) == rounds for queue in queues) else None,
        trial=_trial(system, request, timer) if trial else None,
    )


def _timed(
    system: System,
    block: torch.Tensor,
    cache: Any,
    wait: Callable[[], None],
    timer: Callable[[], float],
) -> tuple[float, float | None]:
    """Seconds of one pass, and how many of them others had the CPU."""
    with contention.watch() as waiting:
        wait()
        began = timer()
        system.step(block, cache, keep=block.shape[1])
        wait()
        seconds = timer() - began
    return seconds, waiting.seconds


def _trial(system: System, request: Request, timer: Callable[[], float]) -> Sample:
    wait = synchronizer(system.device)
    parts = clock.Parts(synchronize=wait, clock=timer)
    timed = replace(system, during=parts.during)
    sample = clock.trace(lambda: timed.generate(request), synchronize=wait, clock=timer)
    return sample.model_copy(update={"parts": parts.stored()})
