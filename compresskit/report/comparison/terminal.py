"""The comparison for people: what is not the same, and the failures in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as Grid
from rich.text import Text

from compresskit.report.comparison.words import (
    COLUMNS,
    around,
    lines,
    message,
    shorten,
    summary,
    unjudged,
)

if TYPE_CHECKING:
    from rich.console import Console

    from compresskit.compare import Comparison

_COLOURS = {
    "better": "green",
    "worse": "bold red",
    "changed": "bold red",
    "inconclusive": "yellow",
    "not compared": "dim",
}

MOST_LINES = 100
"""More than anybody reads on a terminal."""


def render(
    comparison: Comparison, console: Console, *, every: bool = False, gate: bool = False
) -> None:
    """Print `comparison`; with `every` also what is the same; `gate` words it for `check`."""
    shown = lines(comparison, every=every)
    if shown:
        grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for heading in COLUMNS:
            right = heading in ("base", "new", "change")
            grid.add_column(heading, justify="right" if right else "left", overflow="fold")
        for line in shown if every else shorten(shown, MOST_LINES):
            cells = [Text(cell) for cell in line]
            cells[COLUMNS.index("verdict")].stylize(_COLOURS.get(line.verdict, ""))
            grid.add_row(*cells)
        console.print(grid)
    if len(shown) > MOST_LINES and not every:
        _say(console, f"{len(shown) - MOST_LINES} more lines: --all shows them", "dim")
    for row, outcome in comparison.failures()[:MOST_LINES]:
        _say(console, message(row, outcome), "red")
    for sentence in around(comparison, gate=gate):
        _say(console, sentence, "yellow")
    for sentence in unjudged(comparison):
        _say(console, sentence, "dim")
    same = comparison.counts().get("same", 0)
    hint = " (--all shows what is the same)" if same and not every else ""
    _say(console, f"{summary(comparison)}{hint}")


def _say(console: Console, sentence: str, style: str = "") -> None:
    console.print(Text(sentence, style=style), soft_wrap=True)
