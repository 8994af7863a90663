"""Everything that repeats a training, as frozen data with a digest.

A recipe is read from the command line, or from a TOML file whose keys are the fields below; what
the command line says wins. The digest tells two recipes apart: a checkpoint continues its own only.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from compresskit.distill.budget import Amount
from compresskit.errors import SpecError
from compresskit.spec import Frozen, ModelSpec, spec_digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Share = Annotated[float, Field(ge=0, le=1)]


class Recipe(Frozen):
    """How a student is made and taught."""

    teacher: ModelSpec = ModelSpec()
    student: str
    """Makers, one after the other: `layers:keep=0.5 + vocabulary:size=16384`."""
    data: str
    """Any text source (a file, docstrings, datasets:NAME ...), or `rows:FILE.safetensors`."""
    held_out: str | None = None
    """Source of the text that nothing is learned from; without one, every sixteenth row of the data."""
    held_out_rows: Annotated[int, Field(ge=1)] = 32
    """Rows of it at most."""
    length: Annotated[int, Field(ge=2)] = 256
    """Tokens of a row."""
    batch: Annotated[int, Field(ge=1)] = 8
    """Rows that go through the student together, in each process."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Such batches of one step."""
    loss: str = "forward_kl"
    """Terms, added up: `forward_kl`, `ce:weight=0.5 + jsd:beta=0.1,weight=0.5`."""
    teacher_cache: str | None = None
    """topk:k=64 or draws:n=12: what of the teacher is kept on disk; without it the teacher is asked
    in every step."""
    on_policy: Share = 0.0
    """Share of the rows that the student continues itself, for the teacher to judge."""
    on_policy_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the student's own text."""
    on_policy_prompt: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Part of such a row that is real text."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of attention, AdamW for everything else."""
    rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak of the learning rate."""
    others_rate: Annotated[float, Field(gt=0)] = 0.5
    """muon: learning rate of AdamW as a part of Muon's."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices; gains and biases are left alone."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's memory of the gradient and of its square."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the budget in which the rate rises."""
    floor: Share = 0.03
    """The last learning rate as a part of the peak."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Longest gradient, as a 2-norm over all parameters."""
    budget: str = "1M tokens"
    """A number of steps, tokens, minutes or joules."""
    finish: str | None = None
    """A quantiser such as quant/int4, whose rounding the student gets used to at the end."""
    finish_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Last part of the budget that it rounds in."""
    check_every: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the budget between two looks at the held-out text."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Looks without progress after which training stops, the best student kept; 0 = never."""
    save_every: str = "120 seconds"
    """Seconds, minutes, steps or tokens between two checkpoints."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is bfloat16 where the device multiplies it in hardware. Weights and
    softmax stay in float32."""
    checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _sound(self) -> Self:
        amount = Amount.parse(self.budget, option="--budget")
        if amount.kind == "steps" and amount.amount < 1:
            raise ValueError("budget: a training has at least one step")
        if self.finish and amount.kind == "steps" and amount.amount * self.finish_share < 1:
            raise ValueError(
                f"finish_share: {self.finish_share:g} of {self.budget} is less than one step; raise one of "
                "them"
            )
        if Amount.parse(self.save_every, option="--save-every").kind == "joules":
            raise ValueError("save_every: checkpoints go by seconds, steps or tokens")
        if self.teacher_cache is not None and self.on_policy:
            raise ValueError(
                "on_policy: a teacher that is read from a cache has not seen the student's own text; "
                "leave teacher_cache out"
            )
        if self.patience and self.finish is not None:
            raise ValueError(
                "patience: a training that stops early never comes to its finish; leave one of them out"
            )
        return self

    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        return spec_digest(self.model_dump(mode="json"))

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """Name of the first field whose value in the document `other` is another; None if none is."""
        mine = self.model_dump(mode="json")
        names = [*mine, *(name for name in other if name not in mine)]
        return next((name for name in names if mine.get(name) != other.get(name)), None)


def read(path: Path) -> dict[str, Any]:
    """The fields that a recipe file sets, unchecked: the command line may still replace some.

    Raises:
        SpecError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(
            f"--student {path}: {error.strerror or error}. Name a recipe file (*.toml) or makers, such "
            "as layers:keep=0.5."
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"--student {path}: not TOML ({error}).") from None
