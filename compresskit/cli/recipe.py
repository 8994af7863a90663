"""The recipe of `compresskit distill`: flags over a file over defaults."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from compresskit.distill import recipe as recipes
from compresskit.distill.recipe import Recipe
from compresskit.errors import SpecError


def recipe_of(flags: dict[str, Any], source: dict[str, Any]) -> Recipe:
    """The recipe that flags, and the file that --student may name, say; flags win.

    source: flags that say which teacher. None is a flag that was not given.

    Raises:
        SpecError: nothing says what student to make or what to learn from, or a value is wrong.
    """
    given = _said(flags)
    document: dict[str, Any] = {}
    where = "command line"
    named = given.get("student", "")
    if named.endswith(".toml"):
        where = named
        document = recipes.read(Path(named))
        del given["student"]
    teacher = document.get("teacher", {})
    if not isinstance(teacher, dict):
        teacher = {"name": teacher}
    document = {**document, **given, "teacher": {**teacher, **_said(source)}}
    for name, example in (("student", "layers:keep=0.5"), ("data", "my.txt")):
        if name not in document:
            raise SpecError(f"--{name} is missing. Say, for example, --{name} {example}.")
    for name, value in document.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SpecError(f"{where}: {name} is {value}, which is no number to train with.")
    return Recipe.decode(document, where=where)


def _said(values: dict[str, Any]) -> dict[str, Any]:
    """Only what was said."""
    return {name: value for name, value in values.items() if value is not None}
