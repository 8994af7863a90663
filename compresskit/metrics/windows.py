"""Energy windows as samples: which may be added up, and metrics that are ratios of their totals.

Every window is one sample; a value is a ratio of totals over the windows. Where a number comes from
is its provenance:

    measured_counter      a cumulated energy counter
    measured_integrated   a power sensor, integrated by us
    estimated             a model that the user asked for
    unavailable           nothing, and the reason

A total takes the weakest provenance among its windows; measured and estimated are never added, nor
are windows of unlike devices. After a window without a reading the pass takes no more, so that the
i-th value belongs to the i-th turn of its block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from compresskit.metrics.core import Metric, combine, missing_from
from compresskit.record import EnergyPass, EnergyWindow, Estimated, Reading, Unavailable
from compresskit.stats import mean, standard_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from compresskit.metrics.core import Better
    from compresskit.record import Record
    from compresskit.units import Unit

Kind = Literal["prefill", "generate", "idle"]
Provenance = Literal["measured_counter", "measured_integrated", "estimated", "unavailable"]

_INTEGRAL = "_integral"
"""How the source of an integrated power ends."""


def provenance(reading: Reading) -> Provenance:
    """Where an energy reading comes from; only equal ones may be ranked."""
    if isinstance(reading, Unavailable):
        return "unavailable"
    if isinstance(reading, Estimated):
        return "estimated"
    return "measured_integrated" if reading.source.endswith(_INTEGRAL) else "measured_counter"


class Metered(NamedTuple):
    """One window with a reading, and the pass that it belongs to."""

    kind: Kind
    of: EnergyPass
    window: EnergyWindow

    @property
    def joules(self) -> float:
        """Gross joules of the window."""
        value = self.window.reading.value
        return 0.0 if value is None else value

    @property
    def seconds(self) -> float:
        """Length of the window; 0 where it is not stored."""
        return self.window.window_seconds or 0.0

    @property
    def tokens(self) -> float:
        """Prompt tokens (prefill) or delivered ones (generate) of all rows; 0 where not stored."""
        return self.window.tokens or 0

    @property
    def requests(self) -> float:
        """Rows that were read (prefill) or answered (generate); 0 where the record does not tell."""
        per_row = self.of.prompt_tokens if self.kind == "prefill" else self.of.new_tokens
        return self.tokens / per_row if per_row else 0.0


def metered(record: Record, kind: Kind) -> list[Metered] | Unavailable:
    """Windows of one kind that may be added up, or why there are none."""
    found: list[Metered] = []
    lost: Unavailable | None = None
    for block in record.blocks:
        one = block.passes.energy
        if one is None:
            continue
        windows = _windows(one, kind)
        for window in windows:
            if isinstance(window.reading, Unavailable):
                lost = lost or window.reading
                break
            found.append(Metered(kind, one, window))
    if not found:
        return lost or _nothing(record, kind)
    if any(one.joules <= 0 for one in found):
        return Unavailable(reason="the energy counter did not tick in the window")
    return unlike(found) or found


def _nothing(record: Record, kind: Kind) -> Unavailable:
    """Why a record has no window of a kind; the idle one is left out where nothing is measured."""
    if kind == "idle" and any(block.passes.energy is not None for block in record.blocks):
        working = metered(record, "generate")
        if isinstance(working, Unavailable):
            return working
        return Unavailable(reason="the idle machine was not metered")
    return missing_from(record, "energy")


def _windows(one: EnergyPass, kind: Kind) -> tuple[EnergyWindow, ...]:
    if kind == "idle":
        return () if one.idle is None else (one.idle,)
    return one.prefill if kind == "prefill" else one.generate


def unlike(found: Sequence[Metered]) -> Unavailable | None:
    """Why windows must not be added up or subtracted: each board's gain is its own."""
    if len({(one.window.scope, one.window.devices) for one in found}) > 1:
        return Unavailable(reason="windows of unlike devices are not added up")
    return None


def total_ratio(
    found: Sequence[Metered], over: Callable[[Metered], float], under: Callable[[Metered], float]
) -> float:
    """Sum over sum: a mean of ratios would favour short windows."""
    return sum(map(over, found)) / sum(map(under, found))


def like(found: Sequence[Metered], value: float, unit: Unit) -> Reading:
    """`value` as a reading of the kind of the windows it was made from: the weakest of them."""
    readings = [one.window.reading for one in found]
    weakest_first = sorted(readings, key=lambda one: provenance(one) == "measured_counter")
    return combine(
        weakest_first, lambda values: value, unit=unit, absent=Unavailable(reason="no window")
    )


def per_window(
    name: str,
    unit: Unit,
    definition: str,
    kind: Kind,
    over: Callable[[Metered], float],
    under: Callable[[Metered], float],
    *,
    lacks: str,
    better: Better = "lower",
) -> Metric:
    """Build a metric that is a ratio of totals over the windows of one kind.

    `lacks` is said where `under` is not positive for some window, or the whole is not.
    """

    def value(record: Record) -> Reading:
        found = metered(record, kind)
        if isinstance(found, Unavailable):
            return found
        if any(under(one) <= 0 for one in found):
            return Unavailable(reason=lacks)
        ratio = total_ratio(found, over, under)
        return like(found, ratio, unit) if ratio > 0 else Unavailable(reason=lacks)

    def samples(record: Record) -> list[float]:
        found = metered(record, kind)
        if isinstance(found, Unavailable) or isinstance(value(record), Unavailable):
            return []
        return [over(one) / under(one) for one in found]

    def error(record: Record) -> float | None:
        return standard_error(samples(record))

    return Metric(name, unit, better, definition, samples, value, error, first_turns=True)


class Spread(NamedTuple):
    """How far the windows of one metric lie apart."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    """95 % interval of the mean, Student's t."""


def spread(values: Sequence[float]) -> Spread | None:
    """Standard deviation (ddof 1) and interval of the mean; None with fewer than two values."""
    error = standard_error(values)
    if error is None:
        return None
    # Imported when asked for: it takes longer to import than a table takes to print.
    from scipy import stats

    n, centre = len(values), mean(values)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Spread(n, centre, error * math.sqrt(n), centre - half, centre + half)
