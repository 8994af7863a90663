"""`compresskit calibrate`: what a verdict is worth on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskit.cli import options
from compresskit.errors import Exit

if TYPE_CHECKING:
    from compresskit.record import Record
    from compresskit.spec import RunSpec


def calibrate(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH...]",
            help="Records, or folders of them, to take the noise from; without any, this machine "
            "is measured now.",
            show_default=False,
        ),
    ] = None,
    model: options.ModelName = "tiny",
    samples: Annotated[
        int, typer.Option(min=1, help="Samples a side of the comparisons you mean to make.")
    ] = 10,
    factor: Annotated[
        float, typer.Option(min=1.0, help="Ratio of medians below which nobody cares.")
    ] = 1.05,
    trials: Annotated[int, typer.Option(min=100, help="Simulated comparisons per cell.")] = 1000,
    rounds: Annotated[
        int, typer.Option(min=20, help="Rounds of the A/A session, when measuring.")
    ] = 30,
    device: options.DeviceName = "auto",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the document of --json, to this file."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Tell how often a comparison here raises a false alarm, and the smallest effect it can see.

    Without PATH, two equal arms are measured in alternation (an A/A session, under a minute on the
    tiny model): their verdict must not be better or worse, else the exit code is 3. With PATH, the
    noise is taken from what those records hold and nothing is measured. Then comparisons are
    simulated with noise drawn from those samples.

    [bold]Examples[/bold]

      compresskit calibrate

      compresskit calibrate results --samples 10

      compresskit calibrate --model pypi:smollm2-135m --rounds 24 --json --out calibration.json
    """
    import json

    from compresskit.cli.progress import console
    from compresskit.report import calibration as report

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if paths:
        records, warnings = _stored(paths)
        for warning in warnings:
            tell(f"warning: {warning}")
    else:
        records = _session(_spec(model, rounds, device, threads, seed), seed=seed, tell=tell)
    document: dict[str, Any] = report.examine(
        records,
        live=not paths,
        samples=samples,
        factor=factor,
        trials=trials,
        seed=seed,
        progress=lambda text: tell(f"simulating: {text}"),
    )
    text = json.dumps(document, allow_nan=False, ensure_ascii=False)
    if out is not None:
        from compresskit.store import write_text

        write_text(out, text + "\n")
    if as_json:
        print(text)
    else:
        for line in report.lines(document):
            print(line)
    if document["drifted"]:
        tell("error: two equal sides were told apart: " + report.DRIFTED)
        raise typer.Exit(Exit.INVALID)


def _spec(model: str, rounds: int, device: str, threads: int, seed: int) -> RunSpec:
    return options.run_spec(
        options.model_spec(model),
        None,
        device=device,
        workload={"prompt_tokens": 64, "new_tokens": 24},
        protocol={
            "passes": ["latency", "throughput"],
            "warmups": 2,
            "repeats": rounds,
            "threads": threads,
        },
        seed=seed,
    )


def _session(spec: RunSpec, *, seed: int, tell: Any) -> list[Record]:
    """Measure two equal arms; a line every tenth round, as drawing would disturb the measurement."""
    from compresskit import pairing, sweep
    from compresskit.cli.progress import source_progress
    from compresskit.errors import RunError

    with source_progress() as progress:
        sweep.preflight([spec], progress)

    def notify(arm: int, phase: str, detail: str = "") -> None:
        if phase == "round" and arm == 0 and int(detail) % 10 == 0:
            tell(f"A/A session: round {detail} of {spec.protocol.repeats}")

    tell(f"A/A session: two equal arms of {spec.model.name}, loading")
    records = pairing.run([spec, spec], notify, seed=seed)
    for record in records:
        if record.status != "ok":
            raise RunError(f"the A/A session gave no samples: {record.status}: {record.reason}")
    return records


def _stored(paths: list[Path]) -> tuple[list[Record], tuple[str, ...]]:
    from compresskit.report import join

    joined = join.load(paths)
    return [row.record for row in joined.rows if row.validity.verdict != "INVALID"], joined.warnings
