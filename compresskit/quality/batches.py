"""Score the rows of a plan, batch after batch, alone or beside the baseline.

Of a token only a few numbers are kept, so the memory of a pass depends on the window and on the
vocabulary, not on how many tokens are scored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from compresskit.quality.fidelity import Scores
from compresskit.quality.protocol import Cut
from compresskit.quality.score import nll, pair
from compresskit.quality.walk import (
    LARGEST_FORWARD,
    LARGEST_HELD,
    Logits,
    Span,
    clip,
    hold,
    probe,
    spans,
    walk,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from compresskit.quality.protocol import Plan
    from compresskit.system import System

_FLOOR_ROWS, _FLOOR_POSITIONS = 2, 16


class Progress(Protocol):
    """Told how far a part of the pass has come."""

    def __call__(self, label: str, done: int, total: int, /) -> None:
        """`done` of `total` windows or prompts."""


def silent(label: str, done: int, total: int, /) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Batch:
    """Windows that go through the models together."""

    first_row: int
    tokens: torch.Tensor
    """int64 `[B, S + 1]`: inputs and, one to the right, targets."""
    cuts: list[Cut]
    offset: int
    """Input position of column 0 of the scores."""

    @property
    def rows(self) -> int:
        """Windows in the batch."""
        return self.tokens.shape[0]

    def targets(self, start: int, count: int) -> torch.Tensor:
        """True next tokens of `count` input positions from `start`: `[B, count]`."""
        return self.tokens[:, start + 1 : start + 1 + count]

    def place(self, start: int, count: int) -> tuple[slice, slice]:
        """Where the scores of those positions belong."""
        column = start - self.offset
        return (
            slice(self.first_row, self.first_row + self.rows),
            slice(column, column + count),
        )


def score_alone(system: System, plan: Plan, progress: Progress = silent) -> NDArray[np.float32]:
    """NLL of every scored position, windows by positions."""
    scores = np.zeros((len(plan.rows), plan.scored_per_row), dtype=np.float32)
    shape = probe(system, plan.rows[0])
    for batch in _batches(plan, system, shape, progress):

        def see(position: int, logits: torch.Tensor, batch: Batch = batch) -> None:
            count = logits.shape[1]
            found = nll(logits, batch.targets(position, count))
            scores[batch.place(position, count)] = found.cpu().numpy()

        walk(system, batch.tokens, batch.cuts, see)
    return scores


def score_pair(system: System, baseline: System, plan: Plan, progress: Progress = silent) -> Scores:
    """Score every position of `plan` under both systems.

    The baseline's logits are held for one span of positions at a time. Where a whole window fits,
    which is nearly always, each system walks it once; otherwise once per span: time is paid, memory
    is not.
    """
    scores = Scores.empty(len(plan.rows), plan.scored_per_row)
    shape = probe(baseline, plan.rows[0])
    for batch in _batches(plan, system, shape, progress):
        size = shape.positions(LARGEST_HELD, batch.rows, size=shape.dtype.itemsize)
        for span in spans(plan.first, plan.inputs, size):
            held = Held(hold(baseline, batch.tokens, batch.cuts, span, shape), span)
            _compare(system, batch, batch.cuts, held, scores)
            del held  # the next span's logits need the room
    return scores


def noise_floor(baseline: System, plan: Plan) -> str:
    """Say how far the baseline is from itself if the same tokens are cut into other passes.

    Only rounding differs, so a KL of this size says nothing about a method. The last positions of
    the first rows are walked one by one after a longer prefill: a sample, because it costs time.
    """
    plan = replace(plan, rows=plan.rows[:_FLOOR_ROWS])
    tail = min(_FLOOR_POSITIONS, plan.scored_per_row // 2)
    if tail == 0 or plan.inputs <= tail:
        return "noise floor not measured: too few scored tokens"
    shape = probe(baseline, plan.rows[0])
    batch = next(_batches(plan, baseline, shape, silent))
    span = Span(plan.inputs - tail, plan.inputs)
    ones = [Cut(at, at + 1, True) for at in range(span.start, span.stop)]
    recut = [Cut(0, span.start, False), *ones]
    scores = Scores.empty(len(plan.rows), plan.scored_per_row)
    held = hold(baseline, batch.tokens, batch.cuts, span, shape)
    _compare(baseline, batch, recut, Held(held, span), scores)
    seen = scores.kl[batch.place(span.start, tail)]
    return (
        f"noise floor: mean |KL| {float(abs(seen).mean()):.1e} nats per token between two ways "
        f"of cutting {seen.size} tokens into passes ({str(shape.dtype).removeprefix('torch.')})"
    )


class Held(NamedTuple):
    """The baseline's logits `[B, span, V]` of a span of input positions."""

    logits: torch.Tensor
    span: Span


def _compare(
    system: System, batch: Batch, cuts: Sequence[Cut], baseline: Held, scores: Scores
) -> None:
    """Walk `cuts` and write the paired scores of the held span."""
    first = baseline.span.start

    def see(position: int, logits: torch.Tensor) -> None:
        for at, part in clip(position, logits, baseline.span):
            count = part.shape[1]
            reference = baseline.logits[:, at - first : at - first + count]
            found = pair(part, reference, batch.targets(at, count))
            for room, values in zip(scores, found, strict=True):
                room[batch.place(at, count)] = values.cpu().numpy()

    walk(system, batch.tokens, cuts, see)


def _batches(plan: Plan, system: System, shape: Logits, progress: Progress) -> Iterator[Batch]:
    for start in range(0, len(plan.rows), plan.batch):
        rows = plan.rows[start : start + plan.batch]
        yield Batch(
            first_row=start,
            tokens=torch.tensor(rows, device=system.device.torch),
            cuts=plan.cuts(shape.positions(LARGEST_FORWARD, len(rows))),
            offset=plan.first,
        )
        progress("windows", min(start + plan.batch, len(plan.rows)), len(plan.rows))
