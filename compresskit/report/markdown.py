"""The table for README files and pull requests (GitHub's flavour)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.report.cells import superscript, text
from compresskit.report.legend import lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.report.columns import Column
    from compresskit.report.table import Group, Row, Table


def render(table: Table) -> str:
    """Return `table` as Markdown, ending in a newline."""
    parts: list[str] = []
    for group in table.groups:
        parts.append(f"**{escape(group.heading())}**")
        parts.append(_grid(group, group.section("speed"), validity=True))
        for name in ("cost and quality", "tasks", "limits and money", "batch"):
            if group.section(name):
                parts.append(_grid(group, group.section(name)))
    if table.problems:
        parts.append(
            "\n".join(
                f"- {escape(p.label)} ({p.mode}) {p.status}: {escape(p.reason)}"
                for p in table.problems
            )
        )
    if table.warnings:
        parts.append("\n".join(f"- warning: {escape(warning)}" for warning in table.warnings))
    small = [f"{superscript(n)} {escape(note)}" for n, note in enumerate(table.notes, 1)]
    small += map(escape, lines(table))
    # Two trailing spaces would be stripped by editors; a backslash is GitHub's visible line break.
    if small:
        parts.append("\\\n".join(small))
    return "\n\n".join(parts) + "\n"


def _grid(group: Group, columns: Sequence[Column], *, validity: bool = False) -> str:
    headings = ["run", "mode", *(_heading(column) for column in columns)]
    aligned = ["---", "---", *("--:" for _ in columns)]
    if validity:
        headings.insert(2, "validity")
        aligned.insert(2, "---")
    rows = [_line(headings), _line(aligned)]
    for band, members in group.bands():
        if band:
            rows.append(_line([f"**{escape(band)}**", *[""] * (len(headings) - 1)]))
        for row in members:
            line = [escape(row.label), row.mode, *(_cell(row, column) for column in columns)]
            if validity:
                line.insert(2, f"{row.validity.verdict}{superscript(row.note)}")
            rows.append(_line(line))
    return "\n".join(rows)


def _heading(column: Column) -> str:
    return column.heading.replace("/\n", "/").replace("\n", " ")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, column: Column) -> str:
    cell = row.cells[column.key]
    words = escape(text(cell, column.style))
    return f"*{words}*" if cell.kind == "estimated" else words


def escape(words: str) -> str:
    r"""Keep names from being read as Markdown.

    >>> escape("a|b *c*")
    'a\\|b \\*c\\*'
    """
    for mark in "\\|*_`<>~":
        words = words.replace(mark, f"\\{mark}")
    return words
