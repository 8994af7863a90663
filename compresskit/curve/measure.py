"""Time decode steps of several systems at one length, in shuffled turns.

    fill all ──► round 1: B, dense, A ──► round 2: dense, A, B ──► ...
                          └─ a turn: one step untimed, then `STEPS` timed together

Turns taken side by side meet the same machine, so rounds are compared as pairs.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.curve.fill import filled
from compresskit.device import synchronizer
from compresskit.hf.cache import cache_bytes
from compresskit.measure.clock import quiet, settled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compresskit.system import System

STEPS = 4
"""Decode steps timed together: a single one is as short as what disturbs it."""


class Point(NamedTuple):
    """One row at one length."""

    seconds: tuple[float, ...]
    """Per decode step (of the whole batch), one value a round."""
    cache_bytes: dict[str, int]
    """Bytes held after the fill, by what they are."""


def capacity(tokens: int, rounds: int) -> int:
    """Tokens that a row has seen when all turns are over."""
    return tokens + rounds * (STEPS + 1)


def at_length(
    systems: Mapping[str, System], tokens: int, *, rounds: int, batch: int, seed: int
) -> dict[str, Point]:
    """Measure every system with `tokens` in its cache.

    Methods whose saving is simulated have no speed; the caller leaves them out.
    """
    room = capacity(tokens, rounds)
    held: dict[str, dict[str, int]] = {}
    caches: dict[str, Any] = {}
    for name, system in systems.items():
        caches[name] = filled(system, tokens, room, batch=batch, seed=seed)
        held[name] = cache_bytes(caches[name])
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    dice = random.Random(seed)
    order = list(systems)
    with torch.inference_mode(), settled():
        for turn in range(rounds + 1):
            dice.shuffle(order)
            for name in order:
                taken = _turn(systems[name], caches[name], batch, first=turn == 0)
                if turn:  # the first round warms up
                    seconds[name].append(taken)
    return {name: Point(tuple(seconds[name]), held[name]) for name in systems}


def _turn(system: System, cache: Any, batch: int, *, first: bool) -> float:
    token = torch.full((batch, 1), 5, dtype=torch.long, device=system.device.torch)
    wait = synchronizer(system.device)
    with system.attached(), quiet():
        if first:
            system.step(token, cache)
            return 0.0
        system.step(token, cache)
        wait()
        began = time.perf_counter()
        for _ in range(STEPS):
            system.step(token, cache)
        wait()
        return (time.perf_counter() - began) / STEPS
