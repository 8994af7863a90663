"""`compresskit export`: stored records in another tool's format."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """A format of another tool."""

    LLAMA_BENCH = "llama-bench"
    VLLM = "vllm"
    OPTIMUM = "optimum-benchmark"
    PYTEST = "pytest-benchmark"
    MLPERF = "mlperf"


def export(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...", help="Records, or folders of them (searched recursively)."
        ),
    ],
    to: Annotated[Target, typer.Option("--to", help="The format to write.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File to write; a folder for a format that holds one run."),
    ] = None,
) -> None:
    """Print stored records in the format of another tool, by that tool's own definitions.

    INVALID, failed and simulated runs are left out with a note on stderr: other formats have no
    place for a verdict. What a record does not hold is null. The mlperf format borrows names only:
    it is not an MLPerf result.

    [bold]Examples[/bold]

      compresskit export results/my-machine --to llama-bench --out ours.jsonl

      compresskit export results/my-machine --to optimum-benchmark --out reports
    """
    import sys

    from compresskit.errors import UsageError
    from compresskit.exchange import formats
    from compresskit.report import join
    from compresskit.store import write_text

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
