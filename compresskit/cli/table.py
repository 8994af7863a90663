"""`compresskit table`: print stored records, each beside its baseline."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """How a table is printed."""

    RICH = "rich"
    MARKDOWN = "md"
    CSV = "csv"
    JSON = "json"


def table(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Records, or folders of them (searched recursively)."
        ),
    ],
    format: Annotated[
        Format, typer.Option("--format", "-f", help="How to print the table.")
    ] = Format.RICH,
) -> None:
    """Print stored records as a table, each beside its dense baseline.

    Records that cannot be read are left out with a warning on stderr. The exit code is 3 when no
    record holds a valid result.

    [bold]Examples[/bold]

      compresskit table results

      compresskit table results/my-machine/weights --format md
    """
    import json
    import sys

    from rich.console import Console

    from compresskit.errors import Exit
    from compresskit.report import csv, document, join, markdown, table as tables, terminal

    built = tables.build(join.load(paths))
    if format is Format.RICH:
        terminal.render(built, Console())
    elif format is Format.MARKDOWN:
        print(markdown.render(built), end="")
    elif format is Format.CSV:
        print(csv.render(built), end="")
    else:
        print(json.dumps(document.render(built), allow_nan=False, ensure_ascii=False, indent=1))
    if format is not Format.RICH:
        for warning in built.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if built.all_invalid():
        raise typer.Exit(Exit.INVALID)
