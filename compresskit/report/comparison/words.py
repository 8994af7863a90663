"""How an outcome is put into words: values, change, the message of a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit.compare.outcome import FAILING
from compresskit.report.labels import clean
from compresskit.units import format_quantity, significant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.compare import Comparison, Outcome, Row

COLUMNS = ("record", "metric", "base", "new", "change", "verdict", "reason")


class Line(NamedTuple):
    """One line of the table, in the order of `COLUMNS`."""

    record: str
    metric: str
    base: str
    new: str
    change: str
    verdict: str
    reason: str


def names(comparison: Comparison) -> dict[str, str]:
    """What each record is called, by digest: equal labels get the beginning of their digest."""
    labels = {row.new.digest: clean(row.label) for row in comparison.rows}
    given = list(labels.values())
    return {
        digest: f"{label} #{digest[:6]}" if given.count(label) > 1 else label
        for digest, label in labels.items()
    }


def lines(comparison: Comparison, *, every: bool) -> list[Line]:
    """Lines of the table: with `every` all of them, else those that say something new."""
    called = names(comparison)
    return [
        Line(
            called[row.new.digest],
            outcome.metric,
            value(outcome, outcome.base),
            value(outcome, outcome.new),
            change(outcome),
            outcome.word,
            clean(outcome.reason),
        )
        for row, outcome in comparison.outcomes()
        if every or outcome.word not in ("same", "not compared")
    ]


def shorten(found: list[Line], most: int) -> list[Line]:
    """At most so many lines: failures before others, else in their order."""
    if len(found) <= most:
        return found
    return sorted(found, key=lambda line: line.verdict not in FAILING)[:most]


def value(outcome: Outcome, number: float | str | None) -> str:
    """One side. Counts are given whole: a single byte may be the difference."""
    if number is None:
        return "–"
    if isinstance(number, str):
        return clean(number)
    if outcome.tier == "exact" and float(number).is_integer():
        unit = f" {outcome.unit}" if outcome.unit and outcome.unit.value != "count" else ""
        return f"{int(number)}{unit}"
    if outcome.unit is None:
        return significant(number)
    return format_quantity(number, outcome.unit, digits=4)


def change(outcome: Outcome) -> str:
    """How far new is from base, with the interval where there is one."""
    if outcome.ratio is not None:
        found, low, high = outcome.ratio
        return f"{found:.2f}x" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")
    if outcome.delta is not None:
        mean, *bounds = (f"{part:+.2g}" if part else "0" for part in outcome.delta)
        return mean if bounds[0] == bounds[1] else f"{mean} [{', '.join(bounds)}]"
    if isinstance(outcome.base, int | float) and isinstance(outcome.new, int | float):
        difference = outcome.new - outcome.base
        if difference == 0:
            return ""
        return f"{difference:+.0f}" if float(difference).is_integer() else f"{difference:+.4g}"
    return ""


def message(row: Row, outcome: Outcome) -> str:
    """The sentence for a failure: tier, metric, both values, what was allowed, where to look."""
    parts = [
        f"{outcome.tier}: {outcome.metric} of {clean(row.label)} is {outcome.word}: "
        f"base {value(outcome, outcome.base)}, new {value(outcome, outcome.new)}"
    ]
    moved = change(outcome)
    if moved:
        parts.append(f"change {moved}")
    if outcome.ratio is not None and outcome.tolerance is not None:
        parts.append(f"allowed factor {outcome.tolerance:.2f}")
    elif outcome.tolerance is not None:
        parts.append(f"allowed {outcome.tolerance:g}")
    if outcome.p is not None:
        parts.append(f"p = {outcome.p:.2g} of {outcome.n_base} and {outcome.n_new}")
    if outcome.reason:
        parts.append(clean(outcome.reason))
    sentence = ", ".join(parts)
    return f"{sentence}. Look at {outcome.look}." if outcome.look else f"{sentence}."


def unjudged(comparison: Comparison) -> Iterator[str]:
    """What was not compared, one sentence per reason however many records it concerns."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row, outcome in comparison.outcomes():
        if outcome.word == "not compared":
            metrics, records = found.setdefault(outcome.reason, ({}, {}))
            metrics[outcome.metric] = None
            records[row.new.digest] = None
    called = names(comparison)
    for reason, (metrics, records) in found.items():
        whose = called[next(iter(records))] if len(records) == 1 else f"{len(records)} records"
        yield f"not compared: {', '.join(metrics)} of {whose}: {clean(reason)}"


def summary(comparison: Comparison) -> str:
    """How often each verdict was given, in one line."""
    order = ("worse", "changed", "inconclusive", "better", "same", "not compared")
    counts = comparison.counts()
    given = [f"{counts[word]} {word}" for word in order if counts.get(word)]
    number = len(comparison.rows)
    return (
        f"{number} record{'' if number == 1 else 's'}: {', '.join(given) or 'nothing to compare'}"
    )


def around(comparison: Comparison, *, gate: bool) -> Iterator[str]:
    """What is to be said beside the table: refused, missing and new records, notes."""
    for refusal in comparison.refused:
        yield f"refused: {clean(refusal.label)} ({refusal.digest}): {clean(refusal.reason)}"
    for record in comparison.only_base:
        verb = "missing" if gate else "only in base"
        yield f"{verb}: {clean(record.label)} ({record.digest})"
    for record in comparison.only_new:
        verb = "no baseline yet (--update makes one)" if gate else "only in new"
        yield f"{verb}: {clean(record.label)} ({record.digest})"
    yield from map(clean, comparison.notes)
