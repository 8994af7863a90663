"""A student that begins as another model, and what it cost before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit import card as cards
from compresskit.assets import tiny_path
from compresskit.distill.recipe import Recipe
from compresskit.distill.train import train
from compresskit.errors import SpecError, UsageError
from compresskit.hf.student import parse as makers
from compresskit.hf.student.maker import Draft
from compresskit.record import Measured, Training, Unavailable
from compresskit.units import Unit


def teacher() -> Draft:
    path = tiny_path("target")
    model = AutoModelForCausalLM.from_pretrained(path)
    return Draft(model, AutoTokenizer.from_pretrained(path), (0, 1, 2, 3))


def test_the_student_is_the_model_that_was_named() -> None:
    found = makers.parse("given:model=tiny:draft")
    draft = teacher()
    config = makers.shape(found, draft.model.config)
    made = makers.make(found, draft, torch.zeros(1, 8, dtype=torch.int64), seed=0)
    want = AutoModelForCausalLM.from_pretrained(tiny_path("draft")).state_dict()
    assert config.to_dict() == made.model.config.to_dict()
    assert all(torch.equal(value, want[name]) for name, value in made.model.state_dict().items())
    assert made.blocks == (1, 3)
    assert made.facts["given"]["model"] == "tiny:draft"


def test_it_is_the_first_maker_or_none() -> None:
    with pytest.raises(SpecError, match="given"):
        makers.parse("layers:keep=2 + given:model=tiny:draft")
    assert [maker.name for maker in makers.parse("given:model=tiny + layers:keep=2")] == [
        "given",
        "layers",
    ]


def test_a_model_that_does_not_exist_is_an_error_of_the_user() -> None:
    with pytest.raises(UsageError, match="no/where"):
        makers.shape(makers.parse("given:model=./no/where"), None)


def cost(joules: float | None, source: str = "rapl", seconds: float = 10.0) -> Training:
    energy: Any = Unavailable(reason="no counter")
    if joules is not None:
        energy = Measured(value=joules, unit=Unit.JOULE, source=source)
    return Training(
        seconds=seconds, energy=energy, steps=5, tokens=100, teacher_tokens=80, device="cpu",
        started_at="2026-01-01" if seconds == 10 else "2026-01-02",
    )  # fmt: skip


def test_costs_add_up_and_joules_only_of_one_counter() -> None:
    both = cards.together(cost(3.0), cost(4.0, seconds=20.0))
    assert (both.seconds, both.steps, both.tokens, both.teacher_tokens) == (30.0, 10, 200, 160)
    assert both.started_at == "2026-01-01"
    assert isinstance(both.energy, Measured) and both.energy.value == 7.0
    for pair in ((cost(None), cost(4.0)), (cost(3.0), cost(None)), (cost(3.0, "nvml"), cost(4.0))):
        assert isinstance(cards.together(*pair).energy, Unavailable)


def test_a_student_learns_on_and_its_card_counts_both_trainings(tmp_path: Path) -> None:
    fields: Any = {
        "data": "calibration", "length": 64, "batch": 4, "budget": "2 steps", "held_out_rows": 4,
        "check_every": 1.0, "precision": "float32",
    }  # fmt: skip
    first = train(Recipe(student="layers:keep=2", **fields), tmp_path / "first", device="cpu").card
    again = f"given:model={tmp_path / 'first'}"
    second = train(Recipe(student=again, **fields), tmp_path / "second", device="cpu").card
    assert second.checks[0].nll == pytest.approx(first.checks[-1].nll, abs=1e-6)
    assert second.training.steps == 4 and second.training.tokens == 2 * first.training.tokens
    assert second.training.seconds > first.training.seconds
