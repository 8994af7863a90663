"""Long-context tasks on paper: columns of the table, and the lines of one evaluation.

Which tasks there are depends on the records, so the columns are made for each table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.tasks import findings, overall
from compresskit.report.cells import REFERENCE, Cell
from compresskit.report.columns import Column
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from compresskit.metrics.tasks import Finding, Overall
    from compresskit.record import Record, TaskQuality
    from compresskit.stats import Interval

_NOT_ASKED = Cell("unavailable", reason="this task was not asked of this run")
_ROOMY = Cell("unavailable", reason="the cache takes no fewer bytes than a full one")
_OVERALL = {
    "task_delta": "mean Δ",
    "task_worst_delta": "worst Δ",
    "task_truncated_delta": "Δ newest\ntokens",
    "task_removed_delta": "Δ needles\ncut",
    "task_noise_floor": "noise\nfloor",
}
"""What is said of all tasks asked one way: key without that way -> heading."""
LEGEND = (
    "tasks: mean share of what was asked for, found in the greedy answer (string match); aware: the "
    "question was in the prefill; agnostic: it came after the cache had been compressed. Δ: percentage "
    "points against the model's own full cache on the same prompts [95 % bootstrap interval over "
    "prompts], mean over tasks and worst task; tasks that the full cache fails are left out. Controls, with "
    "the full cache on damaged prompts: only the newest tokens that fit into the bytes of the run's "
    "cache; the needles cut out. Noise floor: prompts that flip when the full cache is fed in other "
    "passes."
)


def columns(records: Iterable[Record]) -> tuple[Column, ...]:
    """Columns for the tasks that any of `records` answered; none where there are none."""
    asked = [
        (result.task, when)
        for record in records
        if record.quality is not None and record.quality.tasks is not None
        for result in record.quality.tasks.results
        for when in result.answers
    ]
    ways = dict.fromkeys(when for _, when in asked)
    return (
        *(
            Column(f"{key}_{way}", f"{heading}\n{way}", "tasks", "words")
            for way in ways
            for key, heading in _OVERALL.items()
        ),
        *(
            Column(f"{task}_{way}", f"{task.replace('_', ' ')}\n{way}", "tasks", "share")
            for task, way in dict.fromkeys(asked)
        ),
    )


def cells(record: Record, wanted: Iterable[Column]) -> dict[str, Cell]:
    """The cells of `record` in these columns."""
    keys = [column.key for column in wanted]
    quality = None if record.quality is None else record.quality.tasks
    if quality is None:
        return dict.fromkeys(keys, _NOT_ASKED)
    found = findings(quality)
    made = {f"{one.task}_{one.when}": _score(one) for one in found}
    for way in dict.fromkeys(one.when for one in found):
        own = quality.baseline_digest is None
        told = dict.fromkeys(_OVERALL, REFERENCE) if own else _overall(overall(found, way))
        made |= {f"{key}_{way}": cell for key, cell in told.items()}
    return {key: made.get(key, _NOT_ASKED) for key in keys}


def _score(one: Finding) -> Cell:
    remark = "" if one.standing == "ok" else f"{_spoken(one)} is {one.standing}: {one.reason}"
    return Cell("measured", one.score, Unit.RATIO, remark=remark, reason=remark or _detail(one))


_NOTHING = Cell(
    "unavailable",
    reason="no task means anything for this model: the full cache fails them, or answers without "
    "the needles",
)


def _overall(total: Overall | None) -> dict[str, Cell]:
    """The cells of all tasks together; keys as in `_OVERALL`."""
    if total is None or total.worst.delta is None:
        return dict.fromkeys(_OVERALL, _NOTHING)
    several = f"{total.tasks} task{'s' if total.tasks > 1 else ''}"
    return {
        "task_delta": _delta(total.delta, several),
        "task_worst_delta": _delta(
            total.worst.delta, f"{_spoken(total.worst)}: {_detail(total.worst)}"
        ),
        "task_truncated_delta": _ROOMY if total.truncated is None else _control(total.truncated),
        "task_removed_delta": _control(total.removed),
        "task_noise_floor": Cell(
            "measured", float(total.floor), Unit.COUNT, words=f"{total.floor} of {total.prompts}"
        ),
    }


def _control(delta: float) -> Cell:
    return Cell("measured", delta, Unit.RATIO, words=f"{100 * delta:+.1f}")


def _delta(delta: Interval, told: str) -> Cell:
    return Cell(
        "measured",
        delta.value,
        Unit.RATIO,
        low=delta.low,
        high=delta.high,
        words=points(delta),
        reason=told,
    )


def points(delta: Interval) -> str:
    """Print a difference of shares in percentage points.

    >>> from compresskit.stats import Interval
    >>> points(Interval(-0.25, -0.4, 0.0))
    '-25.0 [-40.0, +0.0]'
    """
    value, low, high = (f"{100 * part:+.1f}" for part in delta)
    return f"{value} [{low}, {high}]"


def lines(quality: TaskQuality) -> Iterator[str]:
    """One evaluation's tasks for people, worst and mean first."""
    found = findings(quality)
    yield f"tasks        {quality.protocol_id}"
    for way in dict.fromkeys(one.when for one in found):
        total = overall(found, way)
        if total is not None and total.worst.delta is not None:
            yield (
                f"  {way}: mean Δ {points(total.delta)} points over {total.tasks} tasks; worst "
                f"{_spoken(total.worst)} {points(total.worst.delta)}"
            )
        elif quality.baseline_digest is not None:
            yield f"  {way}: n/a, {_NOTHING.reason}"
    for one in found:
        yield f"  {_spoken(one)} {one.when}: {_detail(one)}"
    yield from (f"  note: {note}" for note in quality.notes)


def _detail(one: Finding) -> str:
    parts = [f"{one.score:.0%} of {one.prompts} prompts"]
    if one.delta is not None:
        parts += [
            f"full cache {one.reference:.0%}",
            f"Δ {points(one.delta)}" + (" (within the noise floor)" if one.within_noise else ""),
            f"{one.lost} lost, {one.won} won",
            f"answers {one.length_delta:+.1f} tokens",
        ]
    parts += [f"noise floor {one.floor} flips", f"needles removed {one.removed:.0%}"]
    if one.truncated is not None:
        parts.append(f"newest tokens of equal bytes {one.truncated:.0%}")
    if one.standing != "ok":
        parts.append(f"{one.standing.upper()}: {one.reason}")
    return ", ".join(parts)


def _spoken(one: Finding) -> str:
    return one.task.replace("_", " ")
