"""A smaller model, trained to speak as the large one does, in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, JsonValue

from compresskit import card as cards
from compresskit.errors import Conflict
from compresskit.hf import modules
from compresskit.hf.sources.folder import numbers_in
from compresskit.method import AbstractMethod, Stage
from compresskit.spec import ModelSpec
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.card import Card
    from compresskit.method import Context, Outline, Replaced
    from compresskit.system import System

UNKNOWN = "training cost unknown: the student came without a card (distillation.json)"


@final
class Student(AbstractMethod):
    """Run a finished student in the place of its teacher, which stays what quality is measured against.

    Only the student's weights are loaded, so memory and load time are its own. Any model will do as a
    ready student; one made by `compresskit distill` brings a card with what its training cost, and
    break-even then counts that.

    Paper: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    Differs: nothing is trained here; how the student was made is in its card.
    Cost: nothing at run time; the training, once.
    """

    stage: ClassVar[Stage] = Stage.MODEL
    example: ClassVar[Mapping[str, JsonValue]] = {"path": "tiny:draft"}

    path: str = Field("tiny:draft", min_length=1)
    """Folder of the student, or the name of any model."""
    revision: str | None = None
    """Pin of a Hub model: a commit, branch or tag."""

    def effects(self) -> Effects:
        """Another model gives other answers; what it can do is read from its own config."""
        return Effects(requires=frozenset({Trait.MODULES}), removes=frozenset({Trait.LOSSLESS}))

    def stands_in(self) -> ModelSpec:
        """The student."""
        return ModelSpec(name=self.path, revision=self.revision)

    def vet(self, target: Outline, find: Callable[[ModelSpec], Outline]) -> None:
        """Refuse a student whose card names other weights as its teacher."""
        student = find(self.stands_in())
        card = cards.read(student.path)
        if card is not None and card.teacher_revision != target.revision:
            raise Conflict(
                f"the student {student.name} was taught by {card.teacher} "
                f"({card.teacher_revision}), not by {target.name} ({target.revision}): its distance "
                f"from {target.name} would say nothing of the training. Run it beside "
                f"{card.teacher}, or teach it anew."
            )

    def apply(self, system: System, ctx: Context) -> System:
        """Say who stands in for whom, and what that took; the student is loaded already.

        Raises:
            Conflict: nothing was loaded in the place of another model.
        """
        if ctx.replaced is None:
            raise Conflict(
                f"distill/student was applied to a model that is not {self.path}. Name the student "
                "in the stack of a run, or as the model itself."
            )
        card = cards.read(ctx.replaced.loaded.path)
        if card is not None:
            ctx.trained(card.training)
        told = _told(system, ctx.replaced, card)
        facts: dict[str, JsonValue] = {**system.facts, "student": told}
        if ctx.replaced.loaded.bytes > ctx.replaced.asked.bytes:
            before = facts.get("warnings", [])
            facts["warnings"] = [
                *(before if isinstance(before, list) else [before]),
                f"student: {ctx.replaced.loaded.name} takes more bytes than "
                f"{ctx.replaced.asked.name}, which it stands in for",
            ]
        return replace(system, facts=facts)


def _told(system: System, replaced: Replaced, card: Card | None) -> dict[str, JsonValue]:
    """What a record says of the student."""
    asked, loaded = replaced
    told: dict[str, JsonValue] = {
        "name": loaded.name,
        "revision": loaded.revision,
        "parameters": modules.parameter_count(system.model),
        "teacher": asked.name,
        "teacher_revision": asked.revision,
        "teacher_parameters": _parameters(asked) if card is None else card.teacher_size.parameters,
        "teacher_file_bytes": asked.bytes,
    }
    if card is None:
        return {**told, "recipe_digest": None, "training": UNKNOWN}
    first, last = (card.checks[0], card.checks[-1]) if card.checks else (None, None)
    return {
        **told,
        "recipe_digest": card.recipe_digest,
        "training": "as its card tells",
        "stopped": card.stopped,
        "checks": len(card.checks),
        "first_check": None if first is None else first.model_dump(mode="json"),
        "last_check": None if last is None else last.model_dump(mode="json"),
    }


def _parameters(model: Outline) -> int | None:
    """Parameters of a model from the headers of its files, shared ones once; None if these are packed.

    A head that is saved beside the embedding that it is tied to is counted with it.
    """
    if model.config.get("quantization_config"):
        return None
    held: dict[str, int] = {}
    for file in sorted(model.path.glob("*.safetensors")):
        held.update(numbers_in(file))
    if model.config.get("tie_word_embeddings"):
        held.pop("lm_head.weight", None)
    return sum(held.values()) or None
