"""`pytest tests/golden --regolden` rewrites the rendered tables; look at the diff before committing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

RENDERED = Path(__file__).parent / "rendered"


def pytest_addoption(parser):
    parser.addoption("--regolden", action="store_true", help="rewrite the golden files")


@pytest.fixture
def regolden(request) -> bool:
    """Whether to rewrite; the option is known only when pytest is started on this folder."""
    return bool(request.config.getoption("--regolden", default=False))


@pytest.fixture
def same_as_golden(regolden) -> Callable[[str, str], None]:
    """Compare text with a golden file, or rewrite the file."""

    def check(name: str, text: str) -> None:
        path = RENDERED / name
        if regolden:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return check
