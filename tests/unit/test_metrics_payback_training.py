"""Break-even with a training in it: whose seconds may be added to whose, and what stays unknown."""

from __future__ import annotations

import pytest

from compresskit import store
from compresskit.metrics import METRICS
from compresskit.metrics.payback import break_even_joules, break_even_seconds
from compresskit.record import Estimated, Measured, Setup, Training, Unavailable
from compresskit.units import Unit
from tests.unit.test_money import made

SPENT = Measured(value=500.0, unit=Unit.JOULE, source="counter")


def trained(record, **changes):
    """The record as that of a student, whose training took an hour on the record's own machine."""
    document = {
        "seconds": 3600.0,
        "energy": Measured(value=90_000.0, unit=Unit.JOULE, source="counter"),
        "steps": 100,
        "tokens": 1_000_000,
        "teacher_tokens": 250_000,
        "device": record.device.name,
        "threads": record.device.threads,
        "started_at": "2026-01-01T00:00:00Z",
        **changes,
    }
    setup = Setup(load_seconds=1.0, apply_seconds=6.0, energy=SPENT, training=Training(**document))
    return record.model_copy(
        update={"setup": setup, "facts": {"student": {"training": "as its card tells"}}}
    )


def test_training_is_part_of_the_one_off_seconds():
    # 10 ms a token against 4 ms: 6 ms saved; an hour and six seconds to make up for.
    student, teacher = trained(made("int8", rate=250.0)), made(rate=100.0)
    assert break_even_seconds(student, teacher).value == pytest.approx(3606 / 0.006, rel=0.01)
    # The same artefact without a training: what the hour adds.
    bare = made("int8", rate=250.0, setup=Setup(load_seconds=1.0, apply_seconds=6.0))
    assert break_even_seconds(bare, teacher).value == pytest.approx(1000, rel=0.01)


def test_training_is_part_of_the_one_off_joules():
    student, teacher = trained(made("int8", joules=0.25)), made(joules=0.5)
    assert break_even_joules(student, teacher).value == pytest.approx(90_500 / 0.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "another CPU"}, r"trained on another CPU"),
        ({"threads": 7}, r"7 threads"),
        ({"processes": 2}, r"2 processes"),
    ],
)
def test_the_hour_of_another_machine_is_not_added(changes, words):
    seconds = break_even_seconds(trained(made("int8", rate=250.0), **changes), made(rate=100.0))
    joules = break_even_joules(trained(made("int8", joules=0.25), **changes), made(joules=0.5))
    for found in (seconds, joules):
        assert isinstance(found, Unavailable)
        assert "not added" in found.reason
        assert words in found.reason


def test_energies_of_training_follow_the_rules_of_provenance():
    teacher = made(joules=0.5)
    guess = Estimated(value=90_000.0, unit=Unit.JOULE, model="TDP")
    found = break_even_joules(trained(made("int8", joules=0.25), energy=guess), teacher)
    assert "another provenance" in found.reason
    nothing = Unavailable(reason="no counter then")
    found = break_even_joules(trained(made("int8", joules=0.25), energy=nothing), teacher)
    assert found == Unavailable(reason="energy of training: no counter then")


def test_estimates_all_through_give_an_estimate():
    guess = Estimated(value=90_000.0, unit=Unit.JOULE, model="TDP")
    student = trained(made("int8", joules=0.25, estimated=True), energy=guess)
    once = Estimated(value=500.0, unit=Unit.JOULE, model="TDP")
    student = student.model_copy(
        update={"setup": student.setup.model_copy(update={"energy": once})}
    )
    found = break_even_joules(student, made(joules=0.5, estimated=True))
    assert isinstance(found, Estimated)
    assert found.value == pytest.approx(90_500 / 0.25)


def test_a_student_without_a_card_never_gets_a_break_even():
    """Leaving the unknown out would read as: it cost nothing."""
    student = trained(made("int8", rate=250.0, joules=0.25))
    student = student.model_copy(
        update={
            "setup": student.setup.model_copy(update={"training": None}),
            "facts": {"student": {"training": "training cost unknown: no card"}},
        }
    )
    teacher = made(rate=100.0, joules=0.5)
    for found in (break_even_seconds(student, teacher), break_even_joules(student, teacher)):
        assert found == Unavailable(reason="training cost unknown: no card")


def test_a_student_that_is_no_faster_never_pays_its_training_back():
    found = break_even_seconds(trained(made("int8", rate=90.0)), made(rate=100.0))
    assert found.reason.startswith("never")


def test_the_metrics_of_training():
    record = trained(made("int8"))
    values = {
        name: METRICS[name].value(record).value for name in METRICS if name.startswith("training")
    }
    assert values == {
        "training_s": 3600,
        "training_tokens": 1_000_000,
        "training_teacher_tokens": 250_000,
        "training_tokens_per_s": pytest.approx(1_000_000 / 3600),
        "training_energy_j": 90_000,
    }
    cut = trained(made("int8"), tokens=0, steps=0, teacher_tokens=0)
    assert METRICS["training_tokens"].value(cut).value == 0
    assert "not trained" in METRICS["training_tokens_per_s"].value(cut).reason


def test_a_negative_cost_is_no_record(tmp_path):
    path = store.save(trained(made("int8"), seconds=-1.0), tmp_path)
    with pytest.raises(store.RecordError, match="negative cost"):
        store.load(path)
    store.load(store.save(trained(made("int8")), tmp_path))
