"""`compresskit sensitivity`: what rounding each part of a model costs, and widths for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from compresskit.cli import options


def sensitivity(
    model: options.ModelName = "tiny",
    budget: Annotated[
        float, typer.Option(help="Bits per quantised weight, scales included.")
    ] = 4.5,
    choices: Annotated[str, typer.Option(help="Widths to choose from.")] = "2,3,4,6,8",
    granularity: Annotated[
        Literal["layer", "part", "block", "kind"],
        typer.Option(
            help="What gets one width: each layer; attention or MLP of a block; a block; a kind of "
            "layer across the blocks."
        ),
    ] = "part",
    group: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    symmetric: Annotated[bool, typer.Option(help="Levels around zero, without offsets.")] = False,
    head: Annotated[bool, typer.Option(help="Quantise the output head too.")] = True,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave layers dense, by pattern of their names; repeatable."),
    ] = None,
    precision: Annotated[
        Literal["float32", "model"],
        typer.Option(
            help="Measure in float32 (four more bytes a parameter) or in the type of the model, "
            "whose own rounding hides small differences."
        ),
    ] = "float32",
    text: Annotated[
        str, typer.Option(help="Calibration text: calibration, or a file.")
    ] = "calibration",
    samples: Annotated[int, typer.Option(min=1, help="Rows of that text.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 256,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for sensitivity.json, sensitivity.svg and variant.toml."
        ),
    ] = None,
    device: options.DeviceName = "auto",
    dtype: options.DtypeName = "auto",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Round one part of a model at a time, see what it does to the predictions, and choose widths.

    Prints the KL from the dense model for each part and width, and a variant for a suite that packs
    the widths chosen under the budget. With --out, a picture is drawn as well.

    [bold]Examples[/bold]

      compresskit sensitivity --budget 4.25 --out widths

      compresskit sensitivity -m pypi:smollm2-135m --granularity kind --json
    """
    import json

    from rich.console import Console

    from compresskit import artefact as artefacts
    from compresskit.cli.progress import console, source_progress
    from compresskit.report import sensitivity as report

    params: dict[str, Any] = {
        "budget": budget,
        "choices": _widths(choices),
        "granularity": granularity,
        "group": group,
        "symmetric": symmetric,
        "head": head,
        "skip": skip or [],
        "precision": precision,
        "text": text,
        "samples": samples,
        "length": length,
    }
    spec = options.run_spec(
        options.model_spec(
            model,
            revision=revision,
            dtype=dtype,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        ),
        [f"quant/mixed:{','.join(f'{key}={_plain(value)}' for key, value in params.items())}"],
        device=device,
        protocol={"threads": threads},
        seed=seed,
    )
    if out is not None:
        from compresskit.report.plot import canvas

        canvas.check(out / "sensitivity.svg")
    with source_progress() as progress:
        plan = artefacts.plan(spec, progress)
    with (
        console.status("loading") as status,
        artefacts.opened(
            plan, lambda phase, detail="": status.update(f"{phase} {detail}")
        ) as artefact,
    ):
        found = report.document(
            plan.source.name, plan.source.revision, spec.stack[0].params, artefact.system.facts
        )
    if out is not None:
        _write(found, out)
    if as_json:
        print(json.dumps(found, allow_nan=False, ensure_ascii=False))
        return
    report.render(found, Console())
    print(f"\nThe same widths in a suite:\n\n{found['variant']}", end="")
    if out is not None:
        console.print(f"wrote {out}", markup=False, highlight=False)


def _widths(text: str) -> list[int]:
    from compresskit.errors import SpecError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(
            f"--choices {text!r}: list widths of 2 to 8 bits, such as 2,3,4,6,8."
        ) from None


def _plain(value: object) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


def _write(found: dict[str, Any], folder: Path) -> None:
    import json

    from compresskit.report.plot import sensitivity as picture
    from compresskit.store import write_text

    write_text(folder / "sensitivity.json", json.dumps(found, allow_nan=False, indent=1) + "\n")
    write_text(folder / "variant.toml", found["variant"])
    picture.draw(found, folder / "sensitivity.svg")
