"""`compresskit import`: results of other tools, to stand beside ours in a table of their own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compresskit.cli.options import AsJson
from compresskit.cli.table import Format

if TYPE_CHECKING:
    from compresskit.exchange.peers import Peer


class Origin(StrEnum):
    """A tool whose results can be read."""

    LLAMA_BENCH = "llama-bench"
    VLLM = "vllm"
    LM_EVAL = "lm-eval"
    MLPERF = "mlperf"


def import_(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Files of the other tool; without --from, imported results."
        ),
    ],
    origin: Annotated[
        Origin | None, typer.Option("--from", help="The tool that wrote the files.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder to write to; results/imported unless they are only shown."
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name of the results in tables.")] = None,
    model: Annotated[str | None, typer.Option(help="Model, where the file does not say.")] = None,
    device: Annotated[str | None, typer.Option(help="Device, where the file does not say.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the results as a table.")] = False,
    format: Annotated[
        Format, typer.Option("--format", "-f", help="How to print the table.")
    ] = Format.RICH,
    as_json: AsJson = False,
) -> None:
    """Read results of another tool and keep them as *.peer.json, marked with their source.

    `compresskit table` shows them below our rows. They are never ranked with them, divided by them
    or judged: the conditions were the other tool's.

    [bold]Examples[/bold]

      compresskit import bench.jsonl --from llama-bench

      compresskit import mlperf_log_summary.txt --from mlperf --model llama2-70b --device 8xMI300X

      compresskit import results/imported --show --format md
    """
    import sys

    from compresskit.errors import UsageError
    from compresskit.exchange import formats, peers

    if origin is None:
        found, warnings = peers.find(paths)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if not found:
            raise UsageError("no imported results here. Say which tool wrote the files: --from.")
        show = True
    else:
        found = [one for path in paths for one in formats.read(path, origin.value)]
    found = peers.describe(found, label=label, model=model, device=device)
    as_json = as_json or format is Format.JSON
    if out is not None or (origin is not None and not show and not as_json):
        folder = out or Path("results/imported")
        written = peers.save(found, folder)
        print(f"{len(written)} imported results written to {folder}", file=sys.stderr)
    if show or as_json:
        _show(found, Format.JSON if as_json else format)


def _show(found: list[Peer], format: Format) -> None:
    import json

    from rich.console import Console

    from compresskit.exchange import table

    if format is Format.RICH:
        table.rich(found, Console())
    elif format is Format.MARKDOWN:
        print(table.markdown(found), end="")
    elif format is Format.CSV:
        print(table.csv(found), end="")
    else:
        document = {"imported": table.document(found), "definitions": table.definitions(found)}
        print(json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1))
