"""`compresskit distill` as a user meets it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from compresskit import card as cards
from compresskit.cli.app import app
from compresskit.cli.recipe import recipe_of
from compresskit.errors import CompressKitError, SpecError, UnknownName, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

SMALL = ("--student", "layers:keep=0.5,choose=uniform", "--data", "calibration")
SHORT = (
    "--length", "16", "--batch", "2", "--budget", "4 steps", "--held-out-rows", "2",
    "--check-every", "0.5", "--precision", "float32",
)  # fmt: skip


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["distill", *words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("made") / "student"
    return folder, call(*SMALL, *SHORT, "--out", str(folder))


def test_a_verdict_with_sizes_cost_and_the_next_command(made: tuple[Path, Result]) -> None:
    folder, done = made
    assert done.exit_code == 0, done.output
    card = cards.read(folder)
    assert card is not None
    said = " ".join(done.stdout.split())
    for line in ("predicted", "held-out text:", "from the teacher:", "4 steps", "cost:"):
        assert line in said
    assert f"{card.checks[0].nll:.4f} -> {card.checks[-1].nll:.4f}" in said
    assert f"--method distill/student:path={folder}" in said
    energy = card.training.energy
    assert (f"({energy.reason})" in said) == (energy.kind == "unavailable")


def test_without_a_terminal_progress_is_plain_lines(made: tuple[Path, Result]) -> None:
    lines = made[1].stderr.splitlines()
    assert any("step 1" in line and "loss" in line for line in lines)
    assert any("step 0: held-out" in line for line in lines)
    assert "\x1b" not in made[1].stderr


def test_the_student_is_a_model_for_other_commands(made: tuple[Path, Result]) -> None:
    words = ["generate", "-m", str(made[0]), "--prompt", "A story", "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def test_json_is_the_card(tmp_path: Path) -> None:
    done = call(*SMALL, *SHORT, "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    card = cards.read(tmp_path / "out")
    assert card is not None
    assert json.loads(done.stdout) == json.loads(cards.dumps(card))


def test_predicted_sizes_need_no_folder() -> None:
    done = call(*SMALL, "--predict", "--json")
    assert done.exit_code == 0, done.output
    sizes = json.loads(done.stdout)
    assert sizes["student"]["parameters"] < sizes["teacher"]["parameters"]
    shown = call(*SMALL, "--predict")
    assert "student, predicted" in shown.stdout
    assert str(sizes["student"]["parameters"]) in shown.stdout


def test_flags_win_over_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'teacher = "tiny"\nstudent = "layers"\ndata = "pydoc"\nrate = 0.01\nbatch = 3\n'
    )
    found = recipe_of({"student": str(path), "batch": 5}, {"revision": "r"})
    assert (found.student, found.data, found.rate, found.batch) == ("layers", "pydoc", 0.01, 5)
    assert (found.teacher.name, found.teacher.revision) == ("tiny", "r")
    path.write_text('student = "layers"\nlenght = 3\n')
    with pytest.raises(SpecError, match=r"recipe.toml: unknown key 'lenght'.*'length'"):
        recipe_of({"student": str(path), "data": "pydoc"}, {})


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (("--data", "calibration"), SpecError, "--student is missing"),
        (("--student", "layers"), SpecError, "--data is missing"),
        (SMALL, UsageError, "--out"),
        ((*SMALL, "--student", "layer", "--predict"), UnknownName, "layers"),
        ((*SMALL, "--student", "missing.toml"), SpecError, "missing.toml"),
        ((*SMALL, "--loss", "forward", "--predict"), UnknownName, "forward_kl"),
        ((*SMALL, "--budget", "forever", "--predict"), SpecError, "--budget 'forever'"),
        ((*SMALL, "--teacher-cache", "all", "--predict"), UnknownName, "topk"),
        ((*SMALL, "--finish", "quant/gptq", "--predict"), SpecError, "finish"),
        ((*SMALL, "--rate", "nan", "--predict"), SpecError, "rate is nan"),
        ((*SMALL, "--cache", "kept", "--out", "no/where"), UsageError, "--teacher-cache"),
    ],
)
def test_bad_input_is_one_error(
    words: tuple[str, ...], error: type[CompressKitError], said: str
) -> None:
    done: Any = call(*words)
    assert isinstance(done.exception, error), done.output
    assert said in str(done.exception)
    assert done.exception.exit_code == 2


def test_help_has_examples() -> None:
    done = call("--help")
    assert done.exit_code == 0
    assert "Examples" in done.stdout
