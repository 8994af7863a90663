"""When a compression has paid for itself: one-off cost over what each output token saves.

    in seconds    apply_s / (1 / rate of the baseline - 1 / rate)          rent follows time
    in joules     setup_energy_j / (J/token of the baseline - J/token)     electricity follows joules

Where nothing is saved the answer is "never", a reason and not an infinite number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.money import JOULES, OUTPUT_RATE, setup_joules
from compresskit.metrics.pairs import side_by_side
from compresskit.metrics.windows import provenance
from compresskit.record import Estimated, Measured, Reading, Unavailable
from compresskit.stats import judge, median
from compresskit.units import Unit

if TYPE_CHECKING:
    from compresskit.metrics.pairs import Sides
    from compresskit.record import Record


def break_even_seconds(record: Record, baseline: Record) -> Reading:
    """Output tokens after which the time saved makes up for the time of applying the stack.

    The rate is `output_tokens_per_s`. Where the two were measured side by side, only a saving that
    is shown (verdict `better`) is counted with.
    """
    mine, theirs = OUTPUT_RATE.value(record), OUTPUT_RATE.value(baseline)
    if isinstance(mine, Unavailable):
        return mine
    if isinstance(theirs, Unavailable):
        return theirs
    if record.setup is None:
        return Unavailable(reason="the record holds no time of applying the stack")
    sides = side_by_side(OUTPUT_RATE, record, baseline)
    if refused := _not_shown(sides, "time", lower_is_better=False):
        return refused
    fast, slow = map(median, sides) if sides.one else (mine.value, theirs.value)
    return _tokens(record.setup.apply_seconds, 1 / slow - 1 / fast, "time")


def break_even_joules(record: Record, baseline: Record) -> Reading:
    """Output tokens after which the energy saved makes up for the energy of setting up.

    Loading is in the one-off energy, which the baseline had to pay as well: an upper bound. Only
    energies of one provenance from the same devices are subtracted.
    """
    once, mine, theirs = setup_joules(record), JOULES.value(record), JOULES.value(baseline)
    if isinstance(mine, Unavailable):
        return mine
    if isinstance(theirs, Unavailable):
        return theirs
    if isinstance(once, Unavailable):
        return Unavailable(reason=f"energy of setting up: {once.reason}")
    if not provenance(once) == provenance(mine) == provenance(theirs):
        return Unavailable(reason="energies of unlike provenance are not subtracted")
    if _counters(record) != _counters(baseline):
        return Unavailable(reason="the two energies come from unlike counters")
    sides = side_by_side(JOULES, record, baseline)
    if refused := _not_shown(sides, "energy", lower_is_better=True):
        return refused
    lean, dense = map(median, sides) if sides.one else (mine.value, theirs.value)
    found = _tokens(once.value, dense - lean, "energy")
    if isinstance(once, Estimated) and isinstance(found, Measured):
        return Estimated(value=found.value, unit=found.unit, model=once.model)
    return found


def _not_shown(sides: Sides, what: str, *, lower_is_better: bool) -> Unavailable | None:
    """Why a saving measured side by side is not counted with: it may be noise."""
    if not sides.one:
        return None
    found = judge(sides.other, sides.one, lower_is_better=lower_is_better, paired=True)
    if found.word in ("same", "inconclusive"):
        return Unavailable(reason=f"no saving of {what} is shown (verdict: {found.word})")
    return None


def _counters(record: Record) -> set[tuple[str | None, tuple[str, ...]]]:
    """What the energy counters covered: every board has a gain error of its own."""
    return {
        (window.scope, window.devices)
        for block in record.blocks
        if block.passes.energy is not None
        for window in block.passes.energy.generate
    }


def _tokens(once: float, saved_per_token: float, what: str) -> Reading:
    if saved_per_token <= 0:
        return Unavailable(reason=f"never: no {what} is saved per output token")
    return Measured(
        value=once / saved_per_token,
        unit=Unit.TOKEN,
        source=f"one-off {what} over the {what} saved per output token",
    )
