"""The comparison for people: what is not the same, and the failures in sentences."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as Grid
from rich.text import Text

from compresskit.report.comparison.words import (
    Line,
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

_HEADINGS = ("metric", "base", "new", "change", "verdict")
MOST_LINES = 100
"""More than anybody reads on a terminal."""


def render(
    comparison: Comparison, console: Console, *, every: bool = False, gate: bool = False
) -> None:
    """Print `comparison`; with `every` also what is the same; `gate` words it for `check`."""
    shown = lines(comparison, every=every)
    for record, group in groupby(
        shown if every else shorten(shown, MOST_LINES), key=lambda line: line.record
    ):
        _record(console, record, list(group))
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


def _record(console: Console, record: str, shown: list[Line]) -> None:
    """Print the lines of one record; reasons are sentences and stand below."""
    _say(console, record, "bold")
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in _HEADINGS:
        right = heading in ("base", "new", "change")
        grid.add_column(heading, justify="right" if right else "left", overflow="fold")
    for line in shown:
        cells = {heading: Text(getattr(line, heading)) for heading in _HEADINGS}
        cells["verdict"].stylize(_COLOURS.get(line.verdict, ""))
        grid.add_row(*cells.values())
    console.print(grid)
    for line in shown:
        # What was not compared is told once for all records, at the end.
        if line.reason and line.verdict != "not compared":
            _say(console, f"  {line.metric}: {line.reason}", "dim")
    console.print()


def _say(console: Console, sentence: str, style: str = "") -> None:
    console.print(Text(sentence, style=style), soft_wrap=True)
