"""`compresskit methods` and `compresskit models`: what there is to choose from."""

from __future__ import annotations

import json

from compresskit.cli import options


def methods(as_json: options.AsJson = False) -> None:
    """List the compression methods with their parameters.

    [bold]Example[/bold]

      compresskit methods --json
    """
    from rich.console import Console

    from compresskit import catalogue

    rows = [catalogue.describe(name) for name in catalogue.method_names()]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    console = Console()
    for row in rows:
        console.print(
            f"[bold]{row['name']}[/bold]  [dim]{row['stage']}[/dim]  {row['summary']}",
            highlight=False,
        )
        for parameter in row["parameters"]:
            text = f"    {parameter['name']} = {json.dumps(parameter['default'])}   {parameter['help']}"
            console.print(text, markup=False, highlight=False)


def models(as_json: options.AsJson = False) -> None:
    """List the models that can be had without a Hub, and how other models are named.

    [bold]Example[/bold]

      compresskit models
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from compresskit.hf.sources import known

    rows = [asdict(model) for model in known()]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, default=str))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("model", "what it is", "licence", "download"):
        table.add_column(name, overflow="fold")
    for row in rows:
        size = row["download_bytes"]
        table.add_row(
            row["name"],
            row["description"],
            row["licence"],
            f"{size / 1e6:.0f} MB" if size else "none",
        )
    console = Console()
    console.print(table)
    console.print("\nAlso: a Hub id (org/name), a local folder with safetensors, or a .gguf file.")
