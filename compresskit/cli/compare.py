"""`compresskit compare`: two sets of stored records, and what is really different."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compresskit.cli import options
from compresskit.errors import Exit

if TYPE_CHECKING:
    from compresskit.compare import Comparison, Tier


class TierName(StrEnum):
    """The tiers of a comparison, as typed."""

    EXACT = "exact"
    QUALITY = "quality"
    CLOCKS = "clocks"


Tiers = Annotated[
    list[TierName] | None,
    typer.Option("--tier", help="Compare only this tier; repeat for several. [default: all]"),
]
Tolerances = Annotated[
    list[str] | None,
    typer.Option(
        "--tolerance",
        metavar="METRIC=VALUE",
        help="Allow another difference (nll_nats=0.01) or factor (tpot_s=1.5); repeat.",
    ),
]
Every = Annotated[bool, typer.Option("--all", help="Also show what is the same.")]


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A record, or a folder of them.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="A record, or a folder of them.")],
    tier: Tiers = None,
    tolerance: Tolerances = None,
    every: Every = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare stored records: exact counts, quality, clocks and joules.

    Records of equal specs are compared with each other: two states of the code. One record against
    one of another spec is compared as given: a variant against its dense run. Unlike models,
    workloads, protocols or devices are refused. Exit code 0: nothing got worse; 1: something did;
    3: records are invalid or must not be compared.

    [bold]Examples[/bold]

      compresskit compare results-before results-after

      compresskit compare dense.json int8.json --tier quality
    """
    from compresskit import compare as comparing, store
    from compresskit.errors import Incomparable

    with store.many():
        comparison = comparing.compare(
            list(comparing.load(base).values()),
            list(comparing.load(new).values()),
            tiers=read_tiers(tier),
            tolerances=read_tolerances(tolerance),
        )
        if not comparison.rows and not comparison.refused:
            raise Incomparable(
                f"{base} and {new} have no run in common: no digest occurs on both sides. "
                "Give one record each to compare unlike stacks."
            )
        passed = not comparison.failures() and not comparison.refused
        show(comparison, passed=passed, every=every, as_json=as_json)
    leave(comparison)


def read_tiers(given: list[TierName] | None) -> tuple[Tier, ...]:
    """The tiers that were asked for, all by default."""
    from compresskit.compare import TIERS

    return tuple(tier for tier in TIERS if not given or tier in given)


def read_tolerances(given: list[str] | None) -> dict[str, float]:
    """Decode METRIC=VALUE options."""
    import math

    from compresskit.errors import SpecError

    found = {}
    for text in given or ():
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]) or found[name] < 0:
            raise SpecError(
                f"--tolerance {text}: give a metric and a number, for example nll_nats=0.01."
            )
    return found


def show(
    comparison: Comparison, *, passed: bool, every: bool, as_json: bool, gate: bool = False
) -> None:
    """Print the comparison on stdout, as a table or as one JSON document."""
    import json

    from rich.console import Console

    from compresskit.report.comparison import document, terminal

    if as_json:
        rendered = document.render(comparison, passed=passed)
        print(json.dumps(rendered, allow_nan=False, ensure_ascii=False))
    else:
        terminal.render(comparison, Console(), every=every, gate=gate)


def leave(comparison: Comparison) -> None:
    """End with the exit code that the comparison deserves: a regression outranks a refusal."""
    from compresskit.errors import Incomparable

    if comparison.failures():
        raise typer.Exit(Exit.FAILED)
    if comparison.refused:
        first, more = comparison.refused[0], len(comparison.refused) - 1
        rest = f" ({more} more are refused)" if more else ""
        raise Incomparable(f"{first.label} ({first.digest}): {first.reason}{rest}")
