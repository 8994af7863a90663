"""The recipe of the shipped draft is one that `compresskit distill` takes."""

from __future__ import annotations

from transformers import AutoConfig

from benchmarks.tiny import draft
from benchmarks.tiny.corpus import CALIBRATION
from compresskit.assets import tiny_path
from compresskit.distill.losses import terms
from compresskit.hf.student import parse as makers


def test_lessons_are_recipes_and_their_student_has_the_shape_that_is_shipped() -> None:
    config = AutoConfig.from_pretrained(tiny_path("target"))
    shipped = AutoConfig.from_pretrained(tiny_path("draft"))
    student = draft.SHAPE
    for lesson in draft.LESSONS:
        recipe = draft.recipe_of(lesson, teacher="tiny", student=student, rows="r", share=0.5)
        assert recipe.budget == f"{lesson.steps // 2} steps"
        assert {stage.context for stage in lesson.stages} == {recipe.length}
        terms.check(terms.parse(recipe.loss), "dense")
        shape = makers.shape(makers.parse(recipe.student), config)
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size")
        assert all(getattr(shape, name) == getattr(shipped, name) for name in sizes)
        student = "given:model=tiny:draft"


def test_no_text_of_a_lesson_is_of_the_test_split() -> None:
    for lesson in draft.LESSONS:
        for stage in lesson.stages:
            # A row takes fewer than eight documents of such lengths, and some are left over.
            assert stage.first + 8 * stage.steps * stage.batch < CALIBRATION[0]
