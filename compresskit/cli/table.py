"""`compresskit table`: print stored records, each beside its baseline."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class By(StrEnum):
    """What rows are grouped by."""

    BITS = "bits"
    CACHE = "cache"
    SPECULATION = "speculation"
    STUDENTS = "students"


class Format(StrEnum):
    """How a table is printed."""

    RICH = "rich"
    MARKDOWN = "md"
    CSV = "csv"
    JSON = "json"


def table(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Records, or folders of them (searched recursively)."
        ),
    ],
    format: Annotated[
        Format, typer.Option("--format", "-f", help="How to print the table.")
    ] = Format.RICH,
    by: Annotated[
        By | None,
        typer.Option(
            "--by",
            help="bits: rows in bands of effective bits per parameter, closest to dense first. cache: "
            "rows by the bytes that their caches hold. speculation: what drafts brought, where the time "
            "went, and what was to be expected. students: teacher, students and quantised ones of both, with "
            "what training cost.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Also draw KL against effective bits (with --by cache: loss against bytes of the cache; with "
            "--by students: KL against bytes and against tokens/s), to an .svg, .png or .pdf file.",
            show_default=False,
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Rent of the machine per hour.", show_default=False)
    ] = None,
    price_per_kwh: Annotated[
        float | None, typer.Option(help="Electricity per kilowatt-hour.", show_default=False)
    ] = None,
    pue: Annotated[
        float | None,
        typer.Option(
            "--pue",
            help="Power usage effectiveness: energy of the building over that of the machine.",
            show_default=False,
        ),
    ] = None,
    grid_g_per_kwh: Annotated[
        float | None,
        typer.Option(help="Grams of CO2 per kilowatt-hour of this grid.", show_default=False),
    ] = None,
    currency: Annotated[
        str | None,
        typer.Option(
            help="What the prices are in; the records' own, or USD, if not given.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print stored records as a table, each beside its dense baseline.

    Records that cannot be read are left out with a warning on stderr. The exit code is 3 when no
    record holds a valid result. Results imported from other tools (*.peer.json) stand in a table of
    their own, marked with their source. Money and carbon are shown where the suite (`[prices]`) or a flag
    gives a price; a flag stands in for what the record says.

    [bold]Examples[/bold]

      compresskit table results

      compresskit table results/my-machine/weights --format md

      compresskit table results/quantization --by bits --plot bits.svg

      compresskit table results/kv --by cache --plot cache.svg

      compresskit table results/speculation --by speculation

      compresskit table results/students --by students --plot students.svg

      compresskit table results --price-per-hour 2.5 --price-per-kwh 0.1 --grid-g-per-kwh 369
    """
    import json
    import sys

    from rich.console import Console

    from compresskit.errors import Exit
    from compresskit.exchange import peers, table as foreign
    from compresskit.report import csv, document, join, markdown, table as tables, terminal

    given = {
        "per_hour": price_per_hour,
        "per_kwh": price_per_kwh,
        "pue": pue,
        "grams_co2_per_kwh": grid_g_per_kwh,
        "currency": currency,
    }
    prices = {key: value for key, value in given.items() if value is not None}
    imported, unread = peers.find(paths)
    own = [path for path in paths if not path.name.endswith(peers.SUFFIX)]
    built = tables.build(join.load(own, prices) if own else join.Joined(()))
    if plot is not None:
        from compresskit.report.plot import cache, students, tradeoff

        kinds = {By.CACHE: cache.draw, By.STUDENTS: students.draw}
        kinds.get(by or By.BITS, tradeoff.draw)(built, plot)
        print(f"wrote {plot}", file=sys.stderr)
    nothing_valid = built.all_invalid()
    if by is By.BITS:
        from compresskit.report.bits import by_bits

        built = by_bits(built)
    if by is By.CACHE:
        from compresskit.report.held import by_cache

        built = by_cache(built)
    if by is By.SPECULATION:
        from compresskit.report.speculation import by_speculation

        built = by_speculation(built)
    if by is By.STUDENTS:
        from compresskit.report.students import by_students

        built = by_students(built)
    warnings = list(unread)
    if format is Format.RICH:
        terminal.render(built, Console())
        foreign.rich(imported, Console())
    elif format is Format.MARKDOWN:
        print(markdown.render(built), end="")
        if imported:
            print("\n" + foreign.markdown(imported), end="")
    elif format is Format.CSV:
        print(csv.render(built), end="")
        if imported:
            warnings.append(
                "imported results have columns of their own: compresskit import FILE --show -f csv"
            )
    else:
        tree = {**document.render(built), "imported": foreign.document(imported)}
        print(json.dumps(tree, allow_nan=False, ensure_ascii=False, indent=1))
    if format is not Format.RICH:
        warnings = [*built.warnings, *warnings]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if own and nothing_valid:
        raise typer.Exit(Exit.INVALID)
