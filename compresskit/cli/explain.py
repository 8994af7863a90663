"""`compresskit explain`: what a stack does to the system's traits, without loading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskit.cli import options

if TYPE_CHECKING:
    from compresskit.spec import RunSpec


def explain(
    suite: Annotated[
        Path | None,
        typer.Argument(metavar="[SUITE.toml]", help="A suite file.", show_default=False),
    ] = None,
    model: options.ModelName = "tiny",
    method: options.Methods = None,
    mode: options.ModeName = "eager",
    placement: options.Placement = None,
    device: options.DeviceName = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Show the order of a stack, the traits after each step and the first conflict.

    No weights are loaded. A conflict is an answer, not an error: the exit code stays 0.

    [bold]Examples[/bold]

      compresskit explain --method kv/sink_window --method speculative/ngram

      compresskit explain benchmarks/weights.toml --json
    """
    from compresskit import suite as suites

    if suite is not None:
        specs = suites.resolve(suites.read(suite))
    else:
        specs = [
            options.run_spec(
                options.model_spec(model),
                method,
                device=device,
                engine=options.engine(mode, placement),
            )
        ]
    answers = [_answer(spec) for spec in specs]
    if as_json:
        print(json.dumps(answers if suite is not None else answers[0], ensure_ascii=False))
        return
    for answer in answers:
        _show(answer)


def _answer(spec: RunSpec) -> dict[str, Any]:
    from compresskit import artefact as artefacts, catalogue, stack

    plan = artefacts.plan(spec)
    start = plan.start_traits()
    layers = stack.walk(
        plan.methods,
        start,
        last=plan.engine.requires(),
        mode=spec.engine.mode,
        lost=plan.engine.loses(plan.device),
    )
    conflict = next((layer.conflict for layer in layers if layer.conflict), None)
    return {
        "label": catalogue.label(spec.stack, spec.engine.manner),
        "digest": spec.digest(),
        "model": spec.model.name,
        "device": plan.device.name,
        "start": sorted(start),
        "steps": [
            {
                "method": layer.name,
                "stage": layer.stage,
                "removes": sorted(layer.removed),
                "adds": sorted(layer.added),
                "traits": sorted(layer.traits),
                "conflict": layer.conflict,
            }
            for layer in layers
        ],
        "conflict": conflict,
    }


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()

    def line(text: str, style: str = "") -> None:
        console.print(text, markup=False, highlight=False, style=style)

    line(f"{answer['label']}  on {answer['model']}, {answer['device']}", "bold")
    line(f"  start: {', '.join(answer['start'])}")
    for number, step in enumerate(answer["steps"], 1):
        if step["conflict"]:
            line(f"  {number}. {step['method']} [{step['stage']}]: refused", "red")
            continue
        line(f"  {number}. {step['method']} [{step['stage']}]")
        for sign, key in (("-", "removes"), ("+", "adds")):
            if step[key]:
                line(f"       {sign} {', '.join(step[key])}", "dim")
    line(
        f"  conflict: {answer['conflict']}" if answer["conflict"] else "  fits.",
        "red" if answer["conflict"] else "green",
    )
