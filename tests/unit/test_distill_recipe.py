"""Recipes, budgets and rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, strategies

from compresskit.distill import recipe as recipes, schedule
from compresskit.distill.budget import Amount
from compresskit.distill.effort import Effort
from compresskit.distill.recipe import Recipe
from compresskit.errors import SpecError
from compresskit.measure.energy.counters import AbstractCounter, Null
from compresskit.record import Measured, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from pathlib import Path

MINIMAL = {"student": "layers:keep=0.5", "data": "calibration"}


def decode(**fields: Any) -> Recipe:
    return Recipe.decode({**MINIMAL, **fields}, where="test")


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("2M tokens", "tokens", 2e6),
        ("200k tokens", "tokens", 2e5),
        ("1_000 steps", "steps", 1000),
        ("1 step", "steps", 1),
        ("45 minutes", "seconds", 2700),
        ("1.5h", "seconds", 5400),
        ("90 s", "seconds", 90),
        ("20000 joules", "joules", 20000),
        ("20 kJ", "joules", 20000),
        ("2 Wh", "joules", 7200),
    ],
)
def test_amounts_are_read_as_people_write_them(text: str, kind: str, amount: float) -> None:
    found = Amount.parse(text, option="--budget")
    assert (found.kind, found.amount) == (kind, amount)


@pytest.mark.parametrize("text", ["", "2M", "tokens", "2 apples", "0 steps", "-1 steps", "nan s"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(SpecError, match="--budget"):
        Amount.parse(text, option="--budget")


def test_joules_without_a_reading_are_not_zero() -> None:
    with pytest.raises(SpecError, match="no reading of energy"):
        Amount(kind="joules", amount=1.0).spent(steps=1, tokens=1, seconds=1.0, joules=None)


def test_the_rate_rises_and_falls() -> None:
    def at(spent: float) -> float:
        return schedule.factor(spent, warmup=0.1, floor=0.1)

    assert at(0.1) == 1.0
    # The middle of half a cosine is half way down.
    assert at(0.55) == pytest.approx(0.55)
    assert at(1.0) == pytest.approx(0.1)
    assert at(1.7) == at(1.0)
    assert at(0.05) == pytest.approx(0.55)
    assert schedule.factor(0.0, warmup=0.0, floor=0.1) == 1.0


@given(strategies.floats(0, 2), strategies.floats(0, 0.9), strategies.floats(0, 1))
def test_the_rate_stays_between_its_ends(spent: float, warmup: float, floor: float) -> None:
    assert floor - 1e-12 <= schedule.factor(spent, warmup=warmup, floor=floor) <= 1 + 1e-12


def test_a_digest_tells_recipes_apart_and_a_difference_is_named() -> None:
    first, second = decode(), decode(rate=0.5)
    assert first.digest() == decode(batch=8).digest()
    assert first.digest() != second.digest()
    assert first.difference(second.model_dump(mode="json")) == "rate"
    assert first.difference(first.model_dump(mode="json")) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budget": "soon"}, "--budget 'soon'"),
        ({"budget": "0.5 steps"}, "at least one step"),
        ({"save_every": "3 kJ"}, "save_every"),
        ({"on_policy": 0.5, "teacher_cache": "topk:k=4"}, "leave teacher_cache out"),
        ({"patience": 2, "finish": "quant/int4"}, "patience"),
        ({"budget": "4 steps", "finish": "quant/int4"}, "less than one step"),
        ({"budget": "1e999 tokens"}, "to end"),
        ({"rat": 1.0}, "Did you mean 'rate'"),
        ({"batch": 0}, "batch"),
        ({"clip": 0.0}, "clip"),
    ],
)
def test_recipes_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        decode(**fields)


def test_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('student = "layers"\nrate = 1e-4\nbetas = [0.9, 0.98]\n')
    assert recipes.read(path) == {"student": "layers", "rate": 1e-4, "betas": [0.9, 0.98]}
    path.write_text("student = ")
    with pytest.raises(SpecError, match="not TOML"):
        recipes.read(path)
    with pytest.raises(SpecError, match="No such file"):
        recipes.read(tmp_path / "missing.toml")


class Ticking(AbstractCounter):
    """Ten joules more at every reading."""

    source, scope = "fake", "package"

    def __init__(self) -> None:
        self.total_joules = 0.0

    def parts(self) -> tuple[float, ...]:
        self.total_joules += 10
        return (self.total_joules,)

    def reason(self) -> str:
        return "it is a fake"


def test_effort_adds_up_over_sittings() -> None:
    clock = iter(range(1000)).__next__
    with Effort(Ticking(), clock=clock) as effort:
        before = effort.energy()
        assert isinstance(before, Measured)
        effort.resume(100.0, Measured(value=500.0, unit=Unit.JOULE, source="fake"))
        after = effort.energy()
        assert isinstance(after, Measured)
        assert after.value == 500.0 + before.value + 10
        assert effort.seconds() > 100


def test_effort_without_a_counter_is_unavailable_with_its_reason() -> None:
    with Effort(Null("no counter here")) as effort:
        assert effort.energy() == Unavailable(reason="no counter here")
        assert effort.joules() is None


def test_joules_of_a_sitting_that_had_none_are_not_made_up() -> None:
    with Effort(Ticking()) as effort:
        effort.resume(1.0, Unavailable(reason="no counter there"))
        found = effort.energy()
    assert isinstance(found, Unavailable)
    assert "no counter there" in found.reason
