"""Long-context tasks: what was lost against the full cache, and whether that means anything.

    delta      artefact minus full cache, paired by prompt, with a bootstrap over prompts
    flips      prompts with a worse (lost) and a better (won) answer than the full cache's
    floor      prompts that the full cache itself scores differently when the question is fed behind
               the text instead of with it: only rounding differs

A task is `uninformative` where the full cache fails it, and `invalid` where the full cache does as well
on the text without its needles. Neither enters a mean or a worst.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compresskit.stats import mean, weighted_mean_difference

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compresskit.record import TaskAnswers, TaskQuality, TaskResult
    from compresskit.stats import Interval

Standing = Literal["ok", "uninformative", "invalid"]

CONFIDENT = 0.5
"""Mean score of the full cache below which a task says nothing about a method."""


@dataclass(frozen=True)
class Finding:
    """One task, asked one way."""

    task: str
    when: str
    """aware or agnostic: with the question in view of the compression, or not."""
    prompts: int
    score: float
    """Mean share of the references found."""
    reference: float
    """The full cache's."""
    deltas: tuple[float, ...]
    """Score minus reference of each prompt."""
    delta: Interval | None
    """Their mean; None if the run is its own baseline."""
    lost: int
    won: int
    floor: int
    """Prompts that flip between two ways of feeding the full cache."""
    length_delta: float
    """Tokens of the answers minus those of the full cache, mean over prompts."""
    identical: int
    """Prompts answered with the full cache's very tokens."""
    removed: float
    """Control: full cache, needles cut out of the text."""
    truncated: float | None
    """Control: full cache, only the newest tokens that fit into the artefact's bytes."""
    standing: Standing
    reason: str

    @property
    def within_noise(self) -> bool:
        """Whether some answers flipped, but no more than the full cache's own do."""
        return 0 < self.lost + self.won <= self.floor


@dataclass(frozen=True)
class Overall:
    """All tasks that mean something, asked one way."""

    when: str
    tasks: int
    delta: Interval
    """Mean over tasks; prompts of all tasks are resampled together."""
    worst: Finding
    removed: float
    """Control: score of the full cache without the needles, minus its score with them."""
    truncated: float | None
    """Control: the same for the newest tokens that fit into the artefact's bytes; None where a task
    lacks it."""
    floor: int
    """Prompts, of `prompts`, that flip between two ways of feeding the full cache."""
    prompts: int


def findings(quality: TaskQuality) -> tuple[Finding, ...]:
    """Judge every task both ways it was asked, in the order of the record."""
    own = quality.baseline_digest is None
    return tuple(
        _finding(result, when, own=own) for result in quality.results for when in result.answers
    )


def overall(found: Iterable[Finding], when: str) -> Overall | None:
    """Mean and worst change of the tasks asked `when`; None where there is nothing to compare."""
    usable = [
        (one, one.delta)
        for one in found
        if one.when == when and one.standing == "ok" and one.delta is not None
    ]
    if not usable:
        return None
    pooled = [delta for one, _ in usable for delta in one.deltas]
    weights = [1 / one.prompts for one, _ in usable for _ in one.deltas]
    delta = weighted_mean_difference(pooled, [0.0] * len(pooled), weights)
    tasks = [one for one, _ in usable]
    short = [one.truncated - one.reference for one in tasks if one.truncated is not None]
    return Overall(
        when=when,
        tasks=len(tasks),
        delta=delta,
        worst=min(usable, key=lambda pair: pair[1].value)[0],
        removed=mean([one.removed - one.reference for one in tasks]),
        truncated=mean(short) if len(short) == len(tasks) else None,
        floor=sum(one.floor for one in tasks),
        prompts=sum(one.prompts for one in tasks),
    )


def _finding(result: TaskResult, when: str, *, own: bool) -> Finding:
    ours, full = result.answers[when], result.reference[when]
    deltas = tuple(a - b for a, b in zip(ours.scores, full.scores, strict=True))
    one, other = (result.reference[way].scores for way in ("aware", "agnostic"))
    removed = result.controls["removed"]
    truncated = result.controls.get(f"truncated_{when}")
    standing, reason = _standing(full, removed)
    return Finding(
        task=result.task,
        when=when,
        prompts=len(ours.scores),
        score=mean(ours.scores),
        reference=mean(full.scores),
        deltas=deltas,
        delta=None if own else _difference(ours.scores, full.scores),
        lost=sum(delta < 0 for delta in deltas),
        won=sum(delta > 0 for delta in deltas),
        floor=sum(a != b for a, b in zip(one, other, strict=True)),
        length_delta=mean(ours.lengths) - mean(full.lengths),
        identical=sum(
            a == b for a, b in zip(ours.outputs_sha256, full.outputs_sha256, strict=True)
        ),
        removed=mean(removed.scores),
        truncated=None if truncated is None else mean(truncated.scores),
        standing=standing,
        reason=reason,
    )


def _standing(full: TaskAnswers, removed: TaskAnswers) -> tuple[Standing, str]:
    score, bare = mean(full.scores), mean(removed.scores)
    if score < CONFIDENT:
        return "uninformative", f"the full cache itself scores {score:.0%}"
    if not _difference(removed.scores, full.scores).high < 0:
        return (
            "invalid",
            f"the full cache scores {bare:.0%} without the needles and {score:.0%} with them",
        )
    return "ok", ""


def _difference(ours: Sequence[float], full: Sequence[float]) -> Interval:
    return weighted_mean_difference(ours, full, [1.0] * len(full))
