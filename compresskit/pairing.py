"""Measure several runs side by side: all loaded at once, taking turns in shuffled rounds.

    round 0    dense   int8    int4
    round 1    int4    dense   int8
    round 2    int8    int4    dense      ...

What the machine does in the meantime (another user, a warmer chip) meets all of them alike, so
the difference between two columns is theirs. Every arm is a process of its own; while one takes
its turn the others sleep. Memory and quality are judged one arm after the other once the rounds
are over.
"""

from __future__ import annotations

import random
import time
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, Protocol

from compresskit.isolate import Child
from compresskit.runner import Go

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from compresskit.record import Record
    from compresskit.spec import RunSpec

LONGEST_GAP = 0.05
"""Seconds of random pause before a turn: nothing on the machine that beats in time with the turns
can favour one of them."""


class Arm(NamedTuple):
    """One side of a session."""

    spec: RunSpec
    speed_only: bool = False
    """Leave out memory and quality: they are known from an earlier session."""


class Notify(Protocol):
    """Told what an arm is doing."""

    def __call__(self, arm: int, phase: str, detail: str = "") -> None:
        """`arm` is the index of the arm; `phase` is one of load, apply, the passes."""


def silent(arm: int, phase: str, detail: str = "") -> None:
    """Tell nobody."""


def run(specs: Sequence[RunSpec], notify: Notify = silent, *, seed: int = 0) -> list[Record]:
    """Measure `specs` in alternation and return their records, in order.

    Equal specs are allowed: an A/A session.

    Raises:
        UsageError: a run cannot be honoured as asked.
    """
    found = dict(session([Arm(spec) for spec in specs], notify, seed=seed))
    return [found[index] for index in range(len(specs))]


def session(
    arms: Sequence[Arm], notify: Notify = silent, *, seed: int = 0
) -> Generator[tuple[int, Record], None, None]:
    """Measure `arms` in alternation; yield each index with its record as soon as that is complete.

    An arm that fails or is skipped leaves the session; the others go on.

    Raises:
        UsageError: a run cannot be honoured as asked.
    """
    pair = uuid.uuid4().hex[:12] if len(arms) > 1 else None
    rng = random.Random(seed)
    with ExitStack() as stack:
        children: list[Child] = []
        going: list[int] = []
        for index, arm in enumerate(arms):
            child = Child(
                arm.spec,
                lambda phase, detail="", index=index: notify(index, phase, detail),
                pair=pair,
                speed_only=arm.speed_only,
            )
            children.append(stack.enter_context(child))
            # One after the other: loading together would need the memory of all peaks at once.
            if child.ready():
                going.append(index)
        for number in range(max(arm.spec.protocol.repeats for arm in arms)):
            rng.shuffle(going)
            for position, index in enumerate(tuple(going)):
                if number >= arms[index].spec.protocol.repeats:
                    continue
                notify(index, "round", f"{number + 1}")
                time.sleep(rng.uniform(0, LONGEST_GAP) if len(arms) > 1 else 0)
                if not children[index].turn(Go(number, position)):
                    going.remove(index)
        for index, child in enumerate(children):
            record = child.finish()
            child.close()
            yield index, record
