"""What training the model cost, where a student stands in for the run's model.

The run itself trained nothing: these numbers come with the student, from its card. A ready student of a
vendor has none, and a number that nobody knows is no zero: break-even is then unknown as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.core import Metric, missing_from, stored
from compresskit.record import Measured, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic import JsonValue

    from compresskit.record import MemoryPass, Record, Training

NOT_TRAINED = "no student stands in for the model: nothing was trained"


def student(record: Record) -> Mapping[str, JsonValue] | None:
    """What the record says of a student; None where the run's own model ran."""
    told = record.facts.get("student")
    return told if isinstance(told, dict) else None


def student_revision(record: Record) -> str | None:
    """Which weights of the student: a folder may be taught anew, under the same name."""
    told = student(record)
    return None if told is None else str(told.get("revision"))


def training(record: Record) -> Training | Unavailable:
    """The cost of training, or why there is none."""
    if record.status != "ok":
        return missing_from(record, "setup")
    told = student(record)
    if told is None:
        return Unavailable(reason=NOT_TRAINED)
    if record.setup is None or record.setup.training is None:
        return Unavailable(reason=str(told.get("training") or "training cost unknown"))
    return record.setup.training


def _counted(
    name: str, unit: Unit, definition: str, pick: Callable[[Training], float], source: str
) -> Metric:
    def read(record: Record) -> Reading:
        found = training(record)
        if isinstance(found, Unavailable):
            return found
        return Measured(value=pick(found), unit=unit, source=source)

    return stored(name, unit, "lower", definition, read)


def training_joules(record: Record) -> Reading:
    """Joules of training, as its card tells."""
    found = training(record)
    return found if isinstance(found, Unavailable) else found.energy


def _rate(record: Record) -> Reading:
    found = training(record)
    if isinstance(found, Unavailable):
        return found
    if not found.tokens or found.seconds <= 0:
        return Unavailable(reason="the student was cut, but not trained")
    return Measured(
        value=found.tokens / found.seconds, unit=Unit.TOKEN_PER_SECOND, source="card of the student"
    )


def _bits(record: Record) -> Reading:
    weighed = [b.passes.memory for b in record.blocks if b.passes.memory is not None]
    if not weighed or not weighed[-1].weights_bytes:
        return missing_from(record, "memory")
    parameters = _teacher_parameters(record, weighed[-1])
    if not parameters:
        return Unavailable(reason="the parameters of the teacher are not known")
    held = sum(weighed[-1].weights_bytes.values())
    return Measured(value=8 * held / parameters, unit=Unit.BIT, source="storage bytes")


def _teacher_parameters(record: Record, weighed: MemoryPass) -> int | None:
    told = student(record)
    if told is None:
        return weighed.parameters
    found = told.get("teacher_parameters")
    return found if isinstance(found, int) else None


CARD = "card of the student"

TRAINING = (
    _counted(
        "training_s",
        Unit.SECOND,
        "training/1: seconds of making and training the student, checks and the teacher included.",
        lambda cost: cost.seconds,
        CARD,
    ),
    _counted(
        "training_tokens",
        Unit.TOKEN,
        "training_tokens/1: tokens that the student learned from, repeated ones each time.",
        lambda cost: cost.tokens,
        CARD,
    ),
    _counted(
        "training_teacher_tokens",
        Unit.TOKEN,
        "teacher_tokens/1: tokens that the teacher read for the training.",
        lambda cost: cost.teacher_tokens,
        CARD,
    ),
    stored(
        "training_tokens_per_s",
        Unit.TOKEN_PER_SECOND,
        "higher",
        "training_rate/1: training_tokens over training_s, everything else in it included.",
        _rate,
    ),
    stored(
        "training_energy_j",
        Unit.JOULE,
        "lower",
        "training_energy/1: gross energy of the training, over the time of training_s.",
        training_joules,
    ),
    stored(
        "bits_per_teacher_parameter",
        Unit.BIT,
        "lower",
        "bits_per_teacher_parameter/1: 8 weights_bytes over the parameters of the run's model: of the "
        "teacher, where a student stands in for it.",
        _bits,
    ),
)
