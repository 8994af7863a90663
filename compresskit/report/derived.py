"""Cells that need more than one record's metric: ratios, break-even, what a step is bound by.

Runs that were measured side by side get the ratio of medians with a paired interval and a verdict.
Others get the plain ratio: drift of the machine is in it, and an interval over the repetitions
would promise what it cannot keep.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compresskit.metrics import METRICS
from compresskit.metrics.money import JOULES, OUTPUT_RATE
from compresskit.metrics.pairs import side_by_side
from compresskit.metrics.payback import break_even_joules, break_even_seconds
from compresskit.metrics.roofline import bound
from compresskit.metrics.speculation import lossless, missing_steps, of_record
from compresskit.metrics.windows import metered, provenance
from compresskit.record import Estimated, Measured, Unavailable
from compresskit.report.cells import REFERENCE, Cell, Comparison, of_reading
from compresskit.report.labels import clean
from compresskit.stats import judge
from compresskit.units import Unit, format_quantity
from compresskit.validity import FEWEST_SAMPLES

if TYPE_CHECKING:
    from compresskit.record import Reading, Record
    from compresskit.report.join import Match, Row

HEADLINE = METRICS["decode_tokens_per_s"]
"""The rate that ratios and verdicts are about."""


def of_row(key: str, row: Row) -> Cell | None:
    """The cell of column `key`, or None if a metric of the record alone gives it."""
    if key == "decode_ratio_to_baseline":
        return ratio(row.record, row.baseline)
    if key == "decode_ratio_to_best_dense":
        return ratio(row.record, row.best_dense)
    if key.startswith("break_even"):
        return _break_even(key, row)
    if key == "lossless":
        return _lossless(row.record)
    if key == "acceptance_histogram":
        return _histogram(row.record)
    if key == "predicted_ratio_to_baseline":
        return _predicted(row.record, row.baseline)
    if key == "prediction_over_measured":
        return _off(row.record)
    return _bound(row.record) if key == "bound" else None


def ratio(record: Record, match: Match) -> Cell:
    """Ratio of median decode rates, with a verdict if the two took turns."""
    if match.record is None:
        return Cell("unavailable", reason=match.reason)
    if match.record is record:
        return REFERENCE
    sides = side_by_side(HEADLINE, record, match.record)
    if not sides.one:
        return _unpaired(record, match.record)
    found = judge(sides.other, sides.one, lower_is_better=False, paired=True)
    enough = found.n_new >= FEWEST_SAMPLES
    return Cell(
        "measured",
        found.ratio.value,
        Unit.RATIO,
        low=found.ratio.low if enough else None,
        high=found.ratio.high if enough else None,
        comparison=Comparison(
            True, found.word, found.p, found.n_new, found.factor, reason=found.reason
        ),
    )


def _unpaired(record: Record, other: Record) -> Cell:
    mine, theirs = HEADLINE.value(record), HEADLINE.value(other)
    if isinstance(mine, Unavailable) or isinstance(theirs, Unavailable):
        return Cell("unavailable", reason="no decode rate on one of the two sides")
    return Cell(
        "measured", mine.value / theirs.value, Unit.RATIO, comparison=Comparison(paired=False)
    )


def _break_even(key: str, row: Row) -> Cell:
    if row.baseline.record is None:
        return Cell("unavailable", reason=row.baseline.reason)
    if row.baseline.record is row.record:
        return REFERENCE
    by_time = key.endswith("_by_time")
    compute = break_even_seconds if by_time else break_even_joules
    cell = of_reading(compute(row.record, row.baseline.record))
    if cell.reason.startswith("never"):
        cell = replace(cell, words="never")
    metric = OUTPUT_RATE if by_time else JOULES
    paired = bool(side_by_side(metric, row.record, row.baseline.record).one)
    if paired or cell.value is None:
        return cell
    return replace(cell, comparison=Comparison(paired=False))


PREDICTED, MEASURED = METRICS["tpot_predicted_s"], METRICS["tpot_s"]


def _predicted(record: Record, match: Match) -> Cell:
    """What the cost model expects of speculation, over the dense row as it was measured."""
    found = PREDICTED.value(record)
    if match.record is None:
        return Cell("unavailable", reason=match.reason)
    dense = MEASURED.value(match.record)
    if not isinstance(found, Estimated) or not isinstance(dense, Measured):
        missing = dense if isinstance(found, Estimated) else found
        return of_reading(missing)
    ratio = dense.value / found.value
    how = f"{found.model}; over the measured dense row"
    return of_reading(Estimated(value=ratio, unit=Unit.RATIO, model=how))


def _off(record: Record) -> Cell:
    """Predicted time per token over the measured one: how far the cost model is off."""
    found, measured = PREDICTED.value(record), MEASURED.value(record)
    if not isinstance(found, Estimated) or not isinstance(measured, Measured):
        return of_reading(measured if isinstance(found, Estimated) else found)
    ratio = found.value / measured.value
    return of_reading(Estimated(value=ratio, unit=Unit.RATIO, model=found.model))


def _histogram(record: Record) -> Cell:
    """How many steps accepted 0, 1, ... drafted tokens, in a row."""
    found = of_record(record)
    if found is None:
        return Cell("unavailable", reason=missing_steps(record).reason)
    return Cell("derived", words=" ".join(map(str, found.histogram())))


def _lossless(record: Record) -> Cell:
    """What speculation leaves of the output, in a word."""
    word, why = lossless(record)
    return Cell("derived", words=word, reason=why)


def _bound(record: Record) -> Cell:
    """The tag in words, with the modelled times behind it."""
    found = bound(record)
    if isinstance(found, Unavailable):
        return Cell("unavailable", reason=found.reason)
    times = {"memory": found.memory, "compute": found.compute, "launch": found.launch}
    told = ", ".join(
        f"{name} {format_quantity(value, Unit.SECOND)}"
        for name, value in times.items()
        if value is not None
    )
    reason = f"modelled {told} of {format_quantity(found.seconds, Unit.SECOND)} per forward pass"
    remark = f"not compared: {' and '.join(found.left_out)}" if found.left_out else ""
    return Cell(
        "derived",
        words=found.tag.removesuffix("-bound"),
        reason="; ".join(filter(None, (reason, remark))),
        remark=remark,
    )


def with_provenance(cell: Cell, reading: Reading, record: Record) -> Cell:
    """Write on an energy where it comes from and what it covers."""
    windows = metered(record, "generate")
    if isinstance(reading, Unavailable) or isinstance(windows, Unavailable):
        return cell
    scope = windows[0].window.scope or ""
    return replace(cell, provenance=provenance(reading), scope=clean(scope))
