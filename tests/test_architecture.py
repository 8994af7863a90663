"""Promises about the shape of the project: layers, imports, names, speed of `--help`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "compresskit").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def test_kernels_is_no_package() -> None:
    """A `kernels/__init__.py` would shadow Hugging Face's package `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_layers_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "heavy", [("torch", "transformers", "scipy", "numpy", "pydantic", "datasets")]
)
def test_help_loads_nothing_heavy(heavy: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from compresskit.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"loaded = [m for m in {heavy!r} if m in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_nothing() -> None:
    code = "import sys, compresskit; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_few_and_sorted() -> None:
    import compresskit

    assert compresskit.__all__ == sorted(compresskit.__all__)
    assert len(compresskit.__all__) <= 15


def test_no_drawers_for_leftovers() -> None:
    forbidden = {"utils", "util", "common", "misc", "helpers", "manager"}
    assert [path for path in SOURCES if path.stem in forbidden] == []


def test_public_functions_are_documented() -> None:
    """At least 95 % of the functions without a leading underscore say what they do."""
    total, bare = 0, []
    for path in SOURCES:
        for node in _defined(ast.parse(path.read_text())):
            if not node.name.startswith("_"):
                total += 1
                if ast.get_docstring(node) is None:
                    bare.append(f"{path.name}:{node.name}")
    assert len(bare) <= 0.05 * total, bare


def _defined(scope: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Functions and methods; not those inside a function, which nobody outside can call."""
    for node in scope.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _defined(node)


def test_every_module_teaches() -> None:
    missing = [path for path in SOURCES if ast.get_docstring(ast.parse(path.read_text())) is None]
    assert missing == []


def test_broad_except_stands_only_in_the_runner() -> None:
    places = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                if caught in {"Exception", "everything"}:
                    places.append(path.name)
    assert places == ["runner.py"]


def test_shipped_assets_stay_small() -> None:
    size = sum(
        path.stat().st_size
        for path in (ROOT / "compresskit" / "assets").rglob("*")
        if path.is_file()
    )
    assert size < 8_000_000
