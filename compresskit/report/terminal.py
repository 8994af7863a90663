"""The table for people: made for 120 columns, readable at 80 (sections break, numbers do not)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.table import Table as Grid
from rich.text import Text

from compresskit.report.cells import superscript, text
from compresskit.report.legend import lines

if TYPE_CHECKING:
    from rich.console import Console

    from compresskit.report.columns import Column, Section
    from compresskit.report.table import Group, Row, Table

_COLOUR = {"VALID": "green", "WARN": "yellow", "INVALID": "bold red"}
_LABEL_WIDTH = 28


class _Printed(NamedTuple):
    """A column as it will stand on the console."""

    heading: str
    cells: tuple[Text, ...]

    def width(self) -> int:
        """Columns of the console that it takes, with the gap to its right."""
        heads = map(cell_len, self.heading.split("\n"))
        return 2 + max(*heads, *(cell.cell_len for cell in self.cells))


def render(table: Table, console: Console) -> None:
    """Print `table` on `console`."""
    for group in table.groups:
        console.print(Text(group.heading(), style="bold"))
        _section(group, [_validities(group), *_columns(group, "speed")], console)
        _section(group, _columns(group, "cost and quality"), console)
        _section(group, _columns(group, "tasks"), console)
        _section(group, _columns(group, "limits and money"), console)
        _section(group, _columns(group, "batch"), console)
    for problem in table.problems:
        line = Text(f"{problem.label} ({problem.mode}) {problem.status}: ", style="yellow")
        console.print(line.append(problem.reason, style="default"))
    for warning in table.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    for number, note in enumerate(table.notes, 1):
        console.print(Text(f"{superscript(number)} {note}", style="dim"))
    for explanation in lines(table):
        console.print(Text(explanation, style="dim"))


def _columns(group: Group, section: Section) -> list[_Printed]:
    return [
        _Printed(column.heading, tuple(_cell(row, column) for row in group.rows))
        for column in group.section(section)
    ]


def _cell(row: Row, column: Column) -> Text:
    cell = row.cells[column.key]
    style = {"estimated": "italic", "measured": ""}.get(cell.kind, "dim")
    return Text(text(cell, column.style), style=style)


def _validities(group: Group) -> _Printed:
    cells = (
        Text(f"{row.validity.verdict}{superscript(row.note)}", _COLOUR[row.validity.verdict])
        for row in group.rows
    )
    return _Printed("validity", tuple(cells))


def _section(group: Group, columns: list[_Printed], console: Console) -> None:
    """Print columns in as many grids as the width asks for: a number is never cut."""
    labels = [row.name() for row in group.rows]
    label_width = min(_LABEL_WIDTH, 2 + max(map(cell_len, labels), default=0))
    while columns:
        room = console.width - label_width
        fitting = 0
        for column in columns:
            room -= column.width()
            if room < 0:
                break
            fitting += 1
        shown, columns = columns[: max(1, fitting)], columns[max(1, fitting) :]
        console.print(_grid(labels, shown, _starts(group)))
        console.print()


def _starts(group: Group) -> dict[int, str]:
    """Index of the first row of each named band -> its name."""
    starts, index = {}, 0
    for band, members in group.bands():
        if band:
            starts[index] = band
        index += len(members)
    return starts


def _grid(labels: list[str], columns: list[_Printed], bands: dict[int, str]) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    tallest = max(column.heading.count("\n") for column in columns)
    grid.add_column("", max_width=_LABEL_WIDTH, overflow="fold")
    for column in columns:
        # Headings of different heights stand on one line.
        lift = "\n" * (tallest - column.heading.count("\n"))
        grid.add_column(Text(lift + column.heading), justify="right", no_wrap=True)
    for index, label in enumerate(labels):
        if index in bands:
            grid.add_section()
            grid.add_row(Text(bands[index], style="bold"))
        grid.add_row(Text(label), *(column.cells[index] for column in columns))
    return grid
