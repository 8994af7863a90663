"""The comparison for a pull request or the summary page of a CI job (GitHub's flavour)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.report.comparison.words import (
    COLUMNS,
    around,
    lines,
    message,
    shorten,
    summary,
    unjudged,
)
from compresskit.report.markdown import escape

if TYPE_CHECKING:
    from compresskit.compare import Comparison

MOST_LINES = 200
"""GitHub refuses a summary of more than 1 MiB."""


def render(comparison: Comparison, *, title: str, passed: bool, every: bool = False) -> str:
    """Return `comparison` as Markdown, ending in a newline."""
    verdict = "passed" if passed else "**failed**"
    parts = [f"### {escape(title)}: {verdict}", escape(summary(comparison))]
    shown = lines(comparison, every=every)
    if shown:
        grid = [_line(COLUMNS), _line(["---", "---", "--:", "--:", "--:", "---", "---"])]
        grid += [_line([escape(cell) for cell in line]) for line in shorten(shown, MOST_LINES)]
        parts.append("\n".join(grid))
    if len(shown) > MOST_LINES:
        parts.append(f"{len(shown) - MOST_LINES} more lines are left out here.")
    sentences = [message(row, outcome) for row, outcome in comparison.failures()]
    sentences += [*around(comparison, gate=True), *unjudged(comparison)]
    if sentences:
        parts.append("\n".join(f"- {escape(sentence)}" for sentence in sentences[:MOST_LINES]))
    return "\n\n".join(parts) + "\n"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
