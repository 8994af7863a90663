"""Everything that a training needs, found and loaded: teacher, student, rows, lesson.

predict(recipe)   sizes of teacher and student from their configs; no weights
enrol(recipe)     the same with weights, and with rows to learn from
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compresskit import artefact
from compresskit.distill import data as rows_of, finish, narrowed
from compresskit.distill.lesson import Lesson
from compresskit.distill.losses import terms
from compresskit.distill.narrowed import Narrowed
from compresskit.distill.teachers import on_policy
from compresskit.distill.teachers.cache.parse import parse as cache_format
from compresskit.distill.teachers.online import Online
from compresskit.errors import InputError, SpecError
from compresskit.hf import load
from compresskit.hf.student import parse as makers, sizes
from compresskit.hf.student.maker import Draft
from compresskit.hf.tokenizer import HFTokenizer, tokenizer_digest
from compresskit.traits import Trait

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from compresskit.card import Size
    from compresskit.device import Device
    from compresskit.distill.recipe import Recipe
    from compresskit.distill.teachers.cache.formats import Format
    from compresskit.hf.load import Loaded
    from compresskit.hf.sources import Progress, ResolvedModel

_LOOKED_AT = 32
"""Training rows that makers may look at."""
_JUDGES = "ce + forward_kl"
"""What held-out text is judged by, whatever is trained on."""


@dataclass(frozen=True)
class Prediction:
    """What is known before any weight is loaded."""

    source: ResolvedModel
    teacher: Size
    student: Size


@dataclass(frozen=True)
class School:
    """A training that can begin."""

    recipe: Recipe
    source: ResolvedModel
    device: Device
    teacher: Online | Narrowed
    tokenizer: HFTokenizer
    """The student's, which is its teacher's unless the vocabulary was trimmed."""
    draft: Draft
    lesson: Lesson
    judge: Lesson
    """Shares the student with `lesson`."""
    data: rows_of.Data
    teacher_size: Size
    predicted: Size
    dtype: torch.dtype
    """The teacher's, and the one that the student is saved in."""
    autocast: torch.dtype | None
    """Of matrix products; None for the type of the weights."""

    def casting(self) -> AbstractContextManager[Any]:
        """Compute matrix products in the type of the recipe."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.kind, dtype=self.autocast)


def predict(recipe: Recipe, progress: Progress) -> Prediction:
    """Sizes of teacher and student; checks what can be checked without weights.

    Raises:
        UsageError: the teacher, the makers, the loss or the finish cannot be used.
    """
    source = artefact.find_model(recipe.teacher, progress)
    config = load.load_config(source.path, recipe.teacher)
    dtype = _saved_dtype(source, recipe)
    shape = makers.shape(makers.parse(recipe.student), config)
    kind = "dense" if recipe.teacher_cache is None else _format(recipe.teacher_cache).kind
    loss = terms.parse(recipe.loss)
    terms.check(loss, kind)
    on_policy.check(recipe.on_policy, kind, loss)
    if recipe.finish is not None:
        finish.check(recipe.finish)
    return Prediction(
        source, sizes.size_of_config(config, dtype), sizes.size_of_config(shape, dtype)
    )


def enrol(
    recipe: Recipe,
    device: Device,
    *,
    processes: int,
    notify: Callable[[str], None],
    progress: Progress,
) -> School:
    """Load the teacher, read the rows, make the student.

    Raises:
        UsageError: something cannot be used.
    """
    known = predict(recipe, progress)
    autocast = _autocast(recipe, device)
    notify(f"loading {known.source.name}")
    teacher = load.load_model(
        known.source.path, recipe.teacher.model_copy(update={"dtype": _run_dtype(recipe, autocast)}), device
    )  # fmt: skip
    _fits(recipe, teacher)
    notify("reading the text")
    data = _rows(recipe, teacher.tokenizer, processes)
    notify(f"making the student: {recipe.student}")
    draft = _make(recipe, known.source, device, data)
    if recipe.finish is not None:
        # Whether it suits the student is heard now and not when most of the budget is spent.
        finish.begin(draft.model, recipe.finish)
        finish.end(draft.model)
    tokenizer = _tokenizer(draft)
    ids = None
    if tokenizer_digest(tokenizer) != tokenizer_digest(teacher.tokenizer):
        _check_narrowed(recipe)
        size = draft.model.config.get_text_config().vocab_size
        ids = narrowed.ids_in(teacher.tokenizer.inner, draft.tokenizer, size)
        data = _rows(recipe, tokenizer, processes)
    for part in (data.train, data.held_out):
        rows_of.check_ids(part, draft.model.config.get_text_config().vocab_size)
    lesson = Lesson(
        draft.model, terms.parse(recipe.loss), blocks=draft.blocks,
        teacher_width=teacher.model.config.get_text_config().hidden_size,
        checkpointing=recipe.checkpointing,
    )  # fmt: skip
    online = Online(teacher.model, states=lesson.needs_states, autocast=autocast)
    asked = online if ids is None else Narrowed(online, ids)
    return School(
        recipe=recipe,
        source=known.source,
        device=device,
        teacher=asked,
        tokenizer=tokenizer,
        draft=draft,
        lesson=lesson,
        judge=Lesson(draft.model, terms.parse(_JUDGES)),
        data=data,
        teacher_size=known.teacher,
        predicted=known.student,
        dtype=_saved_dtype(known.source, recipe),
        autocast=autocast,
    )


def _format(text: str) -> Format:
    return cache_format(text, option="--teacher-cache")


def _make(recipe: Recipe, source: ResolvedModel, device: Device, data: rows_of.Data) -> Draft:
    """The student, in float32, ready to be trained."""
    torch.manual_seed(recipe.seed)
    spec = recipe.teacher.model_copy(update={"dtype": "float32"})
    whole = load.load_model(source.path, spec, device)
    blocks = tuple(range(whole.model.config.get_text_config().num_hidden_layers))
    draft = Draft(whole.model, whole.tokenizer.inner, blocks)
    draft = makers.make(
        makers.parse(recipe.student), draft, data.train.tokens[:_LOOKED_AT], seed=recipe.seed
    )
    draft.model.requires_grad_(True).train()
    return draft


def _rows(recipe: Recipe, tokenizer: HFTokenizer, processes: int) -> rows_of.Data:
    data = rows_of.load(
        recipe.data, recipe.held_out, tokenizer,
        length=recipe.length, held_out_rows=recipe.held_out_rows,
    )  # fmt: skip
    rows_of.check_enough(data.train, recipe.batch * recipe.accumulate * processes)
    return data


def _tokenizer(draft: Draft) -> HFTokenizer:
    """The student's, with the ends of text that its generation config names."""
    named = draft.model.generation_config.eos_token_id
    ids = [*(named if isinstance(named, list) else [named]), draft.tokenizer.eos_token_id]
    return HFTokenizer(draft.tokenizer, tuple(dict.fromkeys(i for i in ids if i is not None)))


def _check_narrowed(recipe: Recipe) -> None:
    """See that the recipe can do without the teacher's own tokens.

    Raises:
        SpecError: it cannot.
    """
    if recipe.teacher_cache is not None:
        raise SpecError(
            "--teacher-cache keeps what the teacher says in its own tokens, and this student has fewer. "
            "Leave the cache out, or `vocabulary`."
        )
    for source in (recipe.data, recipe.held_out or ""):
        if source.startswith("rows:"):
            raise SpecError(
                f"{source}: rows that are packed already have one tokenizer, and this student's is made "
                "from the text. Give the text, or leave `vocabulary` out."
            )


def _fits(recipe: Recipe, teacher: Loaded) -> None:
    if recipe.length > teacher.context:
        raise InputError(
            f"--length {recipe.length}: the teacher reads {teacher.context} tokens at most."
        )


def _autocast(recipe: Recipe, device: Device) -> torch.dtype | None:
    hardware = Trait.BF16 in device.traits
    wanted = recipe.precision == "bfloat16" or (recipe.precision == "auto" and hardware)
    return torch.bfloat16 if wanted else None


def _run_dtype(recipe: Recipe, autocast: torch.dtype | None) -> str:
    """The teacher's type while it teaches: wider than its own where bfloat16 is slow or unwanted."""
    if recipe.teacher.dtype != "auto":
        return recipe.teacher.dtype
    return "auto" if autocast is not None else "float32"


def _saved_dtype(source: ResolvedModel, recipe: Recipe) -> torch.dtype:
    name: str = recipe.teacher.dtype
    if name == "auto":
        name = load.checkpoint_dtype(load.read_config(source.path))
    found: torch.dtype = getattr(torch, name)
    return found
