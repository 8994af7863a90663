"""`compresskit export`: records in another tool's format, or a compressed model as a checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from compresskit.cli import options
from compresskit.errors import UsageError


class Target(StrEnum):
    """A format of another tool."""

    LLAMA_BENCH = "llama-bench"
    VLLM = "vllm"
    OPTIMUM = "optimum-benchmark"
    PYTEST = "pytest-benchmark"
    MLPERF = "mlperf"


_RECORDS, _MODEL = "Export records", "Export a compressed model"


def export(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RESULTS...]",
            help="Records, or folders of them (searched recursively).",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Target | None,
        typer.Option("--to", help="The format to write.", rich_help_panel=_RECORDS),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Records: file to write, or a folder for a format that holds one run. Model: the "
            "new folder.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            rich_help_panel=_MODEL,
            show_default=False,
            help="The model to compress, as in the other commands.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="FAMILY/NAME:KEY=VALUE,…",
            rich_help_panel=_MODEL,
            help="The method whose weights are written; repeat the option to build one stack.",
        ),
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            "--records",
            rich_help_panel=_MODEL,
            help="Records, or folders of them: the model card shows those of this very stack.",
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            rich_help_panel=_MODEL,
            help="Compare the written weights with the dense model now, for the model card.",
        ),
    ] = False,
    device: options.DeviceName = "auto",
    dtype: options.DtypeName = "auto",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Write records in the format of another tool, or a compressed model that others load.

    Records (RESULTS... --to FORMAT): printed by that tool's own definitions. INVALID, failed and
    simulated runs are left out with a note on stderr: other formats have no place for a verdict.
    What a record does not hold is null. The mlperf format borrows names only: it is not an MLPerf
    result.

    A model (--model M --method quant/... --out DIR): a checkpoint in compressed-tensors, which
    transformers loads and vLLM where the output says so, with a model card. DIR must be new.

    [bold]Examples[/bold]

      compresskit export results/my-machine --to llama-bench --out ours.jsonl

      compresskit export results/my-machine --to optimum-benchmark --out reports

      compresskit export -m pypi:smollm2-135m --method quant/int4:symmetric=true,head=false --out smollm2-w4a16

      compresskit export -m tiny --method quant/int8_dynamic --records results --out tiny-w8a8
    """  # fmt: skip
    if model is None:
        _only_records(
            method=method, records=records, evaluate=evaluate, json=as_json, revision=revision
        )
        _export_records(paths or [], to, out)
        return
    if paths or to is not None:
        raise UsageError(
            "--model writes a checkpoint and takes neither RESULTS nor --to. Export records in a "
            "call of their own; records for the model card go with --records."
        )
    if not method:
        raise UsageError(
            "--model needs the method whose weights are to be written, such as "
            "--method quant/int4:symmetric=true."
        )
    if out is None:
        raise UsageError("--model needs --out DIR, the folder of the new checkpoint.")
    from compresskit.cli import checkpoint

    checkpoint.export(
        options.run_spec(
            options.model_spec(
                model,
                revision=revision,
                dtype=dtype,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            ),
            method,
            device=device,
            protocol={"threads": threads},
            seed=seed,
        ),
        out,
        records=records or [],
        evaluate=evaluate,
        as_json=as_json,
    )


def _only_records(**model_options: object) -> None:
    for name, value in model_options.items():
        if value:
            raise UsageError(f"--{name} belongs to the export of a model: give --model too.")


def _export_records(paths: list[Path], to: Target | None, out: Path | None) -> None:
    import sys

    from compresskit.exchange import formats
    from compresskit.report import join
    from compresskit.store import write_text

    if not paths:
        raise UsageError(
            "nothing to export: give records (RESULTS... --to FORMAT), or a model "
            "(--model M --method quant/... --out DIR)."
        )
    if to is None:
        raise UsageError(f"--to is missing: one of {', '.join(target.value for target in Target)}.")
    joined = join.load(paths)
    kept, notes = formats.usable(row.record for row in joined.rows)
    for note in (*joined.warnings, *notes):
        print(f"warning: {note}", file=sys.stderr)
    chosen = formats.exporter(to.value)
    if chosen.one_run and len(kept) > 1:
        if out is None or out.is_file():
            raise UsageError(
                f"a {to.value} report holds one run and here are {len(kept)}. "
                "Name one record, or give a folder with --out."
            )
        for record in kept:
            write_text(out / record.digest / "benchmark_report.json", chosen.render([record]))
        print(f"{len(kept)} reports written to {out}", file=sys.stderr)
        return
    text = chosen.render(kept)
    if not text:
        raise UsageError(f"nothing here was run in a way that {to.value} could describe.")
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        print(f"written to {out}", file=sys.stderr)
