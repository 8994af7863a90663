"""The card of a student: what it was made of, what was predicted, what it became, what that cost.

Lies as `distillation.json` in the student's folder, written by `compresskit distill`, read by
`distill/student`, which puts the cost of training into its records.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import Field, JsonValue, ValidationError
from pydantic_core import from_json

from compresskit.errors import ModelError
from compresskit.record import Environment, Measured, Stored, Training, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

FILE = "distillation.json"
VERSION = 1


class Size(Stored):
    """How large a model is."""

    parameters: int
    """Shared ones once."""
    weight_bytes: int
    """In the type that it is saved in."""
    flops_per_token: int
    """Two for each multiplication with a weight in a decode step; attention over the cache left out."""
    kv_bytes_per_token: int
    """Keys and values of one token of one row, in the type that it is saved in."""


class Check(Stored):
    """One look at text that the student never learns from."""

    step: int
    tokens: int
    """Tokens learned from by then."""
    nll: float
    """Nats per token of the held-out text."""
    kl: float | None = None
    """Nats per token from the teacher; null where the two count tokens differently."""
    packed_nll: float | None = None
    """As `nll`, with weights as the quantiser of the recipe's `finish` will store them; null while the
    student learns without rounding."""
    packed_kl: float | None = None
    """As `kl`, likewise."""


class Card(Stored):
    """What `distillation.json` holds."""

    version: int = VERSION
    recipe: dict[str, JsonValue]
    recipe_digest: str
    teacher: str
    """As it was named."""
    teacher_revision: str
    """As resolved: a commit, or sha256 of the weights."""
    teacher_baseline: str
    """full_precision, dequantized_gguf, tiny_trained ..."""
    teacher_size: Size
    predicted: Size
    """Before any training."""
    size: Size
    """As saved."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """What the makers had to say."""
    training: Training
    checks: tuple[Check, ...]
    stopped: str
    """Why training ended: the budget is spent, no more progress ..."""
    environment: Environment | None = None


def together(earlier: Training, later: Training) -> Training:
    """The cost of two trainings of one student; device, threads and processes are the later one's."""
    energy = later.energy
    if isinstance(earlier.energy, Measured) and isinstance(energy, Measured):
        if earlier.energy.source == energy.source:
            total = earlier.energy.value + energy.value
            energy = energy.model_copy(update={"value": total})
        else:
            energy = Unavailable(
                reason=f"{earlier.energy.source} counted one part of the training, {energy.source} the other"
            )
    elif not isinstance(earlier.energy, Measured):
        energy = Unavailable(reason="an earlier part of the training has no measured energy")
    return later.model_copy(
        update={
            "seconds": earlier.seconds + later.seconds,
            "energy": energy,
            "steps": earlier.steps + later.steps,
            "tokens": earlier.tokens + later.tokens,
            "teacher_tokens": earlier.teacher_tokens + later.teacher_tokens,
            "started_at": earlier.started_at,
        }
    )


def read(folder: Path) -> Card | None:
    """The card in `folder`; None where there is none.

    Raises:
        ModelError: there is one that cannot be read.
    """
    path = folder / FILE
    try:
        document: Any = from_json(path.read_bytes(), allow_inf_nan=False)
        return Card.model_validate(document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(
            f"{path}: not the card of a student ({first}). Make the student again, or delete the card: "
            "its cost is then unknown."
        ) from None


def dumps(card: Card) -> str:
    """JSON text of `card`."""
    return json.dumps(card.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
