"""When a compression has paid for itself: one-off cost over what each output token saves.

    in seconds    once / (1 / rate of the baseline - 1 / rate)             rent follows time
                  once = apply_s + training_s
    in joules     once / (J/token of the baseline - J/token)               electricity follows joules
                  once = setup_energy_j + training_energy_j

Training counts where a student stands in for the model. Its seconds are added to those of this run only
where both ran on a device of the same name with as many threads, its joules only where both energies
are of one provenance too: an hour of one machine is not an hour of another. A student without a card
has a cost that nobody knows, and then nothing is known of its payback either. Where nothing is saved
the answer is "never", a reason and not an infinite number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.money import JOULES, OUTPUT_RATE, setup_joules
from compresskit.metrics.pairs import side_by_side
from compresskit.metrics.training import student, training
from compresskit.metrics.windows import provenance
from compresskit.record import Estimated, Measured, Reading, Unavailable
from compresskit.stats import judge, median
from compresskit.units import Unit

if TYPE_CHECKING:
    from compresskit.metrics.pairs import Sides
    from compresskit.record import Record, Training


def break_even_seconds(record: Record, baseline: Record) -> Reading:
    """Output tokens after which the time saved makes up for that of applying the stack and training.

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
    trained = _training_here(record)
    if isinstance(trained, Unavailable):
        return trained
    once = record.setup.apply_seconds + (0.0 if trained is None else trained.seconds)
    sides = side_by_side(OUTPUT_RATE, record, baseline)
    if refused := _not_shown(sides, "time", lower_is_better=False):
        return refused
    fast, slow = map(median, sides) if sides.one else (mine.value, theirs.value)
    return _tokens(once, 1 / slow - 1 / fast, "time")


def break_even_joules(record: Record, baseline: Record) -> Reading:
    """Output tokens after which the energy saved makes up for the energy of setting up and training.

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
    trained = _training_here(record)
    if isinstance(trained, Unavailable):
        return trained
    spent = once.value
    if trained is not None:
        learned = trained.energy
        if isinstance(learned, Unavailable):
            return Unavailable(reason=f"energy of training: {learned.reason}")
        if provenance(learned) != provenance(once):
            return Unavailable(
                reason="the energy of training is of another provenance than the run's"
            )
        spent += learned.value
    if _counters(record) != _counters(baseline):
        return Unavailable(reason="the two energies come from unlike counters")
    sides = side_by_side(JOULES, record, baseline)
    if refused := _not_shown(sides, "energy", lower_is_better=True):
        return refused
    lean, dense = map(median, sides) if sides.one else (mine.value, theirs.value)
    found = _tokens(spent, dense - lean, "energy")
    if isinstance(once, Estimated) and isinstance(found, Measured):
        return Estimated(value=found.value, unit=found.unit, model=once.model)
    return found


def _training_here(record: Record) -> Training | Unavailable | None:
    """The cost of training, if it may be added to that of this run; None where nothing was trained."""
    if student(record) is None:
        return None
    found = training(record)
    if isinstance(found, Unavailable):
        return found
    here = record.device
    if here is None or (found.device, found.threads) != (here.name, here.threads):
        told = "an unknown device" if here is None else _place(here.name, here.threads)
        return Unavailable(
            reason=f"trained on {_place(found.device, found.threads)}, measured on {told}: the two "
            "costs are not added"
        )
    if found.processes > 1:
        return Unavailable(
            reason=f"trained by {found.processes} processes, measured in one: the two costs are not added"
        )
    return found


def _place(device: str, threads: int | None) -> str:
    """A device and its threads, in words."""
    return device if threads is None else f"{device} ({threads} thread{'s' * (threads != 1)})"


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
