"""Every command of docs/distillation.md can be typed as it stands."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from compresskit import suite as suites
from compresskit.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("console") for line in block.splitlines() if line.strip()]


def parse(line: str) -> None:
    """Read a command as the program would, and run nothing."""
    words = shlex.split(line)
    start = words.index("compresskit")
    assert start == 0 or words[start - 1] == "-m"
    group = get_command(app)
    name, *rest = words[start + 1 :]
    context = group.make_context("compresskit", [name], resilient_parsing=True)
    command = group.get_command(context, name)
    assert command is not None, f"no command {name}"
    command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_is_understood(line):
    parse(line)


def test_the_page_shows_four_commands_and_what_else_there_is():
    names = [re.search(r"compresskit (\w+)", line).group(1) for line in COMMANDS]
    assert names[:4] == ["distill", "distill", "run", "table"]


@pytest.mark.parametrize(
    "line",
    ["compresskit distill --no-such-option 1", "compresskit table results --by nothing"],
)
def test_a_command_that_is_wrong_is_not_understood(line):
    """Negative control."""
    with pytest.raises(Exception, match=r"(?i)no such option|is not one of"):
        parse(line)


def test_the_suite_of_the_page_is_a_suite(tmp_path):
    (text,) = blocks("toml")
    assert tomllib.loads(text)["model"]
    path = tmp_path / "students.toml"
    path.write_text(text, encoding="utf-8")
    labels = {spec.label() for spec in suites.resolve(suites.read(path))}
    assert labels == {
        "dense",
        "quant/int8",
        "quant/int4",
        "distill/student",
        "distill/student + quant/int8",
    }
