"""What the teacher says of each step's rows: from the model, from a cache, on text of either's making.

no cache       the model reads every batch
teacher_cache  it reads all training rows once, before the first step; then its answers are looked up
on_policy      some rows are continued by the student as it stands, then the model reads the batch
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from compresskit.distill.narrowed import Narrowed
from compresskit.distill.teachers import on_policy
from compresskit.distill.teachers.cache import read, report, write
from compresskit.distill.teachers.cache.parse import parse
from compresskit.distill.teachers.cache.source import Source
from compresskit.hf.tokenizer import tokenizer_digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic import JsonValue

    from compresskit.distill.batch import Batch, Target
    from compresskit.distill.school import School
    from compresskit.distill.teachers.protocol import Teacher
    from compresskit.hf.sources import Progress

FOLDER = "teacher-cache"


class Bill(NamedTuple):
    """What was done for a training before its clock began to run."""

    seconds: float
    teacher_tokens: int


class Asking:
    """The teacher of one process, with the student's own part in what it is asked."""

    def __init__(
        self,
        school: School,
        teacher: Teacher,
        facts: Mapping[str, JsonValue] = MappingProxyType({}),
        bill: Bill = Bill(0.0, 0),  # noqa: B008 - it is immutable
    ) -> None:
        """Ask `teacher`."""
        self.school, self.teacher = school, teacher
        self.facts = facts
        """What there is to say about a cache, for the card."""
        self.bill = bill
        """Of the shards of a cache that were there: every student that reads them is charged them."""
        self.generated_tokens = 0
        """That the student wrote, in this process."""
        self.writing_seconds = 0.0
        """What that took."""
        recipe = school.recipe
        self._write = on_policy.by(
            school.draft.model, temperature=recipe.on_policy_temperature, autocast=school.autocast
        )

    def told(self) -> dict[str, JsonValue]:
        """For the card: what a cache keeps and loses, what the student wrote itself."""
        if not self.school.recipe.on_policy:
            return dict(self.facts)
        wrote: dict[str, JsonValue] = {
            "tokens": self.generated_tokens,
            "seconds": self.writing_seconds,
        }
        return {**self.facts, "on_policy_of_first_process": wrote}

    def posed(self, batch: Batch, turn: int) -> Batch:
        """The batch as it will be learned from; `turn` counts batches over steps and processes."""
        recipe = self.school.recipe
        if not recipe.on_policy:
            return batch
        mixed = on_policy.mixed(
            batch, recipe.on_policy, self._write, seed=recipe.seed, step=turn,
            prompt_share=recipe.on_policy_prompt, stop=self.school.tokenizer.eos_ids,
        )  # fmt: skip
        self.generated_tokens += mixed.generated_tokens
        self.writing_seconds += mixed.seconds
        return mixed.batch

    def targets(self, batch: Batch) -> Target:
        """What the teacher says of it."""
        return self.teacher.targets(batch)


def ask(school: School, folder: Path, *, writes: bool, progress: Progress) -> Asking:
    """The teacher that the recipe wants; a cache of it lies in `folder` and is written if `writes`.

    Raises:
        SpecError, ModelError: the cache in `folder` is of something else, or damaged.
        RunError: it cannot be written.
    """
    recipe = school.recipe
    if recipe.teacher_cache is None or isinstance(school.teacher, Narrowed):
        return Asking(school, school.teacher)
    rows = school.data.train.tokens
    source = Source.of(
        rows,
        teacher=school.source.name,
        revision=school.source.revision,
        tokenizer=tokenizer_digest(school.tokenizer),
    )
    bill = Bill(0.0, 0)
    if writes:
        done = write.write(
            folder, school.teacher, rows, form=parse(recipe.teacher_cache, option="--teacher-cache"),
            belongs=source, seed=recipe.seed, batch=recipe.batch, progress=progress,
        )  # fmt: skip
        if done.kept:
            manifest = done.manifest
            bill = Bill(
                max((manifest.seconds or 0.0) - done.seconds, 0.0),
                (manifest.teacher_tokens or 0) - done.tokens_read,
            )
    cached = read.open(folder, wanted=source)
    return Asking(school, cached, {"teacher_cache": report.facts(cached.manifest)}, bill)
