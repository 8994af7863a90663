"""The `compresskit` command: registers the commands and turns errors into exit codes.

Exit codes: 0 done, 1 the run failed or was interrupted, 2 bad usage or bad input, 3 results
invalid. stdout carries results, stderr everything else.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import compresskit
from compresskit.cli.audit import audit
from compresskit.cli.calibrate import calibrate
from compresskit.cli.check import check
from compresskit.cli.compare import compare
from compresskit.cli.curve import curve
from compresskit.cli.demo import demo
from compresskit.cli.distill import distill
from compresskit.cli.doctor import doctor
from compresskit.cli.drafts import drafts
from compresskit.cli.evaluate import evaluate
from compresskit.cli.explain import explain
from compresskit.cli.export import export
from compresskit.cli.generate import generate
from compresskit.cli.import_ import import_
from compresskit.cli.listing import methods, models
from compresskit.cli.memory import memory
from compresskit.cli.replay import replay
from compresskit.cli.run import run
from compresskit.cli.schema import schema
from compresskit.cli.sensitivity import sensitivity
from compresskit.cli.table import table
from compresskit.errors import CompressKitError, Exit

app = typer.Typer(
    name="compresskit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    epilog="Start with [bold]compresskit demo --fast[/bold]: an honest table in under a minute, offline.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(compresskit.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Which compression for this model on this machine, and what will it cost?

    compresskit applies quantization, distillation, KV-cache and speculative-decoding methods to a
    language model and measures speed, memory, energy and quality of the very same artefact.
    """


for command in (
    demo,
    run,
    table,
    compare,
    check,
    memory,
    methods,
    models,
    explain,
    generate,
    evaluate,
    doctor,
    schema,
    calibrate,
    sensitivity,
    replay,
    drafts,
    curve,
    distill,
    audit,
):
    app.command()(command)
app.command("export")(export)
app.command("import")(import_)


def main() -> None:
    """Run the command line; every error on purpose is one message and one exit code."""
    try:
        app()
    except CompressKitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our stdout left (`compresskit table … | head`): not an error of the run.
        sys.stderr.close()
        sys.exit(Exit.DONE)
