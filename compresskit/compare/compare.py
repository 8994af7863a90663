"""Compare two sets of records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit import store
from compresskit.compare import agree
from compresskit.compare.checks import CHECKS, STATUS
from compresskit.compare.match import match
from compresskit.compare.outcome import TIERS, Comparison, Outcome, Refusal, Row
from compresskit.compare.two import Two
from compresskit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from compresskit.compare.line import Check
    from compresskit.compare.outcome import Tier
    from compresskit.record import Record


def compare(
    base: Sequence[Record],
    new: Sequence[Record],
    *,
    tiers: Collection[Tier] = TIERS,
    tolerances: Mapping[str, float] | None = None,
) -> Comparison:
    """Compare `new` with `base`, record by record.

    `tolerances` replaces those of `CHECKS` by metric. Records that must not be compared are listed
    as refused; nothing of them is compared.

    Raises:
        UsageError: a tolerance for a metric that has none, or a factor below 1.
    """
    allowed = dict(tolerances or {})
    tunable = {check.name for check in CHECKS if check.tolerance is not None}
    for name in allowed.keys() - tunable:
        raise UsageError(f"no tolerance for {name!r}. Known: {', '.join(sorted(tunable))}.")
    for check in CHECKS:
        if check.tier == "clocks" and allowed.get(check.name, 1.0) < 1:
            raise UsageError(f"the tolerance of {check.name} is a factor: give 1 or more.")
    matched = match(base, new)
    rows: list[Row] = []
    refused: list[Refusal] = []
    with store.many():
        for one, other in matched.pairs:
            reasons = list(agree.refusals(one, other))
            if reasons:
                refused.append(Refusal(other.label, other.digest, "; ".join(reasons)))
                continue
            rows.append(Row(one, other, tuple(_outcomes(Two(one, other), tiers, allowed))))
    return Comparison(
        rows=tuple(rows),
        only_base=tuple(matched.only_base),
        only_new=tuple(matched.only_new),
        refused=tuple(refused),
        notes=tuple(matched.notes),
    )


def _outcomes(two: Two, tiers: Collection[Tier], tolerances: Mapping[str, float]) -> list[Outcome]:
    found = [_one(STATUS, two, None)]
    if two.base.status == two.new.status == "ok":
        found += [
            _one(check, two, tolerances.get(check.name)) for check in CHECKS if check.tier in tiers
        ]
    return [outcome for outcome in found if outcome is not None]


def _one(check: Check, two: Two, asked: float | None) -> Outcome | None:
    # Quality tolerances are differences, clocks decide between the session's and the pair's factor.
    tolerance = asked if asked is not None or check.tier == "clocks" else check.tolerance
    outcome = check.judge(check, two, tolerance)
    if outcome is None or not (reason := two.lacking(check.needs)):
        return outcome
    return Outcome(
        check.tier,
        check.name,
        "not compared",
        check.unit,
        outcome.base,
        outcome.new,
        reason=reason,
        look=check.look,
    )
