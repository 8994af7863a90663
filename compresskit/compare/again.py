"""Believe a slower clock only when a second session says the same.

Counts do not change from one session to the next; a machine does. A clock that was called worse is
measured again, and stays worse only if it is worse again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compresskit.compare.outcome import Comparison, Outcome
    from compresskit.spec import RunSpec


def doubtful(first: Comparison) -> list[RunSpec]:
    """Specs of the rows with a clock that got worse."""
    specs = {
        row.new.digest: row.new.spec
        for row, outcome in first.failures()
        if outcome.tier == "clocks"
    }
    return list(specs.values())


def confirm(first: Comparison, second: Comparison) -> Comparison:
    """Return `first` with its worse clocks confirmed or withdrawn by `second`."""
    repeated = {
        (row.new.digest, outcome.metric): outcome
        for row, outcome in second.outcomes()
        if outcome.tier == "clocks"
    }
    rows = tuple(
        replace(
            row,
            outcomes=tuple(
                _settled(outcome, repeated.get((row.new.digest, outcome.metric)))
                for outcome in row.outcomes
            ),
        )
        for row in first.rows
    )
    return replace(first, rows=rows)


def _settled(once: Outcome, again: Outcome | None) -> Outcome:
    if once.tier != "clocks" or not once.failed:
        return once
    if again is None:
        return replace(once, reason=_join(once.reason, "could not be measured again"))
    found = "" if again.ratio is None else f" ({_ratio(again)})"
    if again.failed:
        return replace(once, reason=_join(once.reason, f"worse again in a second session{found}"))
    reason = f"worse at first ({_ratio(once)}), {again.word} in a second session{found}"
    return replace(again, word="inconclusive", reason=reason)


def _ratio(outcome: Outcome) -> str:
    return "no ratio" if outcome.ratio is None else f"ratio {outcome.ratio.value:.2f}"


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
