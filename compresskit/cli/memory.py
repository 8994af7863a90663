"""`compresskit memory`: peaks of stored records taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compresskit.cli import options


def memory(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORD...", help="Records, or folders of them (searched recursively)."
        ),
    ],
    by_module: Annotated[
        bool,
        typer.Option("--modules", help="Instead: bits and bytes of every kind of module."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show where the bytes are: each phase's peak, its parts, and what they leave over.

    The parts are read one by one and never fitted to the peak; the rest is shown as unattributed
    and may be negative where two parts claim the same bytes.

    With --modules, the audit of the weights: what each kind of module stands for and takes, copies
    and leftovers included.

    [bold]Examples[/bold]

      compresskit memory results/my-machine/weights

      compresskit memory results --modules

      compresskit memory results --json
    """
    import json
    import sys

    from rich.console import Console

    from compresskit.report import audit, join, memory as peaks

    reports = audit if by_module else peaks
    joined = join.load(paths)
    records = [row.record for row in joined.rows]
    if as_json:
        print(json.dumps(reports.document(records), allow_nan=False, indent=1))
    else:
        reports.render(records, Console())
    for warning in joined.warnings:
        print(f"warning: {warning}", file=sys.stderr)
