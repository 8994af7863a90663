"""Play a trace: every request with the store of prefixes and without it, in alternation.

    request 1   with, without
    request 2   without, with
    request 3   with, without ...

So both sides meet the same prompts and the same moods of the machine. Requests run one at a time, in
the order of the trace and without waiting.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from compresskit.decode import check_request
from compresskit.device import synchronizer
from compresskit.errors import InputError, RunError
from compresskit.measure import clock
from compresskit.methods.reuse._step import PrefixStep
from compresskit.methods.reuse._store import Match, Store
from compresskit.spec import SamplingSpec
from compresskit.system import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from compresskit.methods.reuse._store import Write
    from compresskit.record import Sample
    from compresskit.replay.trace import Entry
    from compresskit.system import System

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One request, played."""

    line: int
    prompt_tokens: int
    hit_tokens: int
    """Prompt tokens that were not computed."""
    lookup_seconds: float
    """Host time of finding the prefix; part of `ttft_seconds`."""
    ttft_seconds: float
    """To the first token, with the store: lookup, copies, the rest of the prompt, storing it."""
    computed_ttft_seconds: float | None
    """The same request without the store; None if that was not asked for."""
    same_tokens: bool | None
    """Whether both gave the same tokens; None if only one was run."""


class Stopwatch(Store):
    """A store whose lookups are timed; everything else is the store's inside."""

    def __init__(self, inner: Store, now: Callable[[], float] = time.perf_counter) -> None:
        """Time nothing yet."""
        super().__init__(inner.slots, inner.unit, inner.identity)
        self.inner, self.now, self.statistics = inner, now, inner.statistics
        self.seconds = 0.0

    def lookup(self, tokens: Sequence[int], salt: str = "") -> Match:
        """Look up, and add the time it took."""
        began = self.now()
        match = self.inner.lookup(tokens, salt)
        self.seconds += self.now() - began
        return match

    def extend(self, match: Match, write: Write) -> None:
        """As the store inside."""
        self.inner.extend(match, write)

    def release(self, match: Match) -> None:
        """As the store inside."""
        self.inner.release(match)

    @property
    def stored_tokens(self) -> int:
        """As the store inside."""
        return self.inner.stored_tokens


def requests(system: System, entries: Sequence[Entry], *, seed: int = 0) -> list[Request]:
    """The requests of a trace as `system` takes them, all checked before the first one runs.

    Raises:
        InputError: a prompt is no text of this model, or does not fit its context; names the line.
    """
    vocabulary = system.model.get_input_embeddings().weight.shape[0]
    found = []
    for entry in entries:
        ids = (
            system.tokenizer.encode(entry.prompt)
            if isinstance(entry.prompt, str)
            else list(entry.prompt)
        )
        largest = max(ids, default=0)
        if largest >= vocabulary:
            raise InputError(
                f"line {entry.line}: token {largest} is not in this model's vocabulary of {vocabulary}. "
                "The trace was made for another model."
            )
        request = Request(
            tokens=torch.tensor([ids], dtype=torch.long, device=system.device.torch),
            max_new_tokens=entry.new_tokens,
            sampling=SamplingSpec(),
            seed=seed,
        )
        try:
            check_request(system, request)
        except InputError as error:
            raise InputError(f"line {entry.line}: {error}") from None
        found.append(request)
    return found


def play(
    system: System,
    entries: Sequence[Entry],
    *,
    compare: bool = True,
    seed: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[Turn]:
    """Play `entries` through `system`, whose step has a store in front.

    Args:
        system: with a method of the reuse family applied, and nothing after it.
        entries: the trace.
        compare: also run each request without the store.
        seed: of the requests.
        tick: told how many requests of how many are over.

    Raises:
        InputError: a request does not fit the model.
        RunError: `system` has no store.
    """
    step = system.step
    if not isinstance(step, PrefixStep):
        raise RunError("this system has no store of prefixes: apply a method of the reuse family.")
    plain = replace(system, step=step.inner)
    todo = requests(system, entries, seed=seed)
    # Libraries set themselves up on first use; the store stays as it is.
    for _ in plain.generate(replace(todo[0], max_new_tokens=1)):
        pass
    watch = Stopwatch(step.store)
    step.store = watch
    turns = []
    try:
        with clock.settled():
            for index, (entry, request) in enumerate(zip(entries, todo, strict=True)):
                before = watch.statistics.hit_tokens
                watch.seconds = 0.0
                sides = [system, plain] if compare else [system]
                with step.salted(entry.salt or step.salt):
                    taken = [_time(side, request) for side in _turned(sides, index)]
                stored, *others = _turned(taken, index)
                other = others[0] if others else None
                turns.append(
                    Turn(
                        line=entry.line,
                        prompt_tokens=request.tokens.shape[-1],
                        hit_tokens=watch.statistics.hit_tokens - before,
                        lookup_seconds=watch.seconds,
                        ttft_seconds=stored.arrivals[0].seconds,
                        computed_ttft_seconds=other.arrivals[0].seconds if other else None,
                        same_tokens=stored.tokens_sha256 == other.tokens_sha256 if other else None,
                    )
                )
                tick(index + 1, len(todo))
    finally:
        step.store = watch.inner
    return turns


def _time(system: System, request: Request) -> Sample:
    return clock.trace(lambda: system.generate(request), synchronize=synchronizer(system.device))


def _turned(sides: list[T], index: int) -> list[T]:
    """The other way round every second time."""
    return sides[::-1] if index % 2 else sides
