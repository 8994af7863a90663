"""`compresskit demo`: an honest table for a real model with one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compresskit.cli import options


def demo(
    fast: Annotated[
        bool, typer.Option("--fast", help="Use the shipped tiny model: offline, under a minute.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Another model.  [default: pypi:smollm2-135m]", show_default=False
        ),
    ] = None,
    device: options.DeviceName = "auto",
    threads: options.Threads = 1,
    out: options.OutFolder = Path("results"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh", help="Keep records that this code made here, or measure all again."
        ),
    ] = True,
    as_json: options.AsJson = False,
) -> None:
    """Measure dense, int8, int4, a quantized cache, speculation and one stack; print the table.

    [bold]Examples[/bold]

      compresskit demo --fast

      compresskit demo

      compresskit demo --model HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from compresskit import suite as suites
    from compresskit.cli.run import finish, sweep_with_progress

    loaded = suites.read(suites.shipped("demo-fast" if fast else "demo"))
    changes: dict[str, Any] = {
        "device": device,
        "protocol": loaded.protocol.model_dump(mode="json") | {"threads": threads},
    }
    if model is not None:
        changes["model"] = model
    loaded = suites.Suite.decode(loaded.model_dump(mode="json") | changes, where="demo")
    swept = sweep_with_progress(suites.resolve(loaded), suite=loaded.name, out=out, resume=resume)
    finish(swept, as_json=as_json, reading=True)
