"""`compresskit check`: run a suite and hold it against a baseline."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compresskit.cli import options
from compresskit.cli.compare import (
    Every,
    Tiers,
    Tolerances,
    leave,
    read_tiers,
    read_tolerances,
    show,
)
from compresskit.errors import Exit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from compresskit.compare import Comparison, Tier
    from compresskit.record import Record
    from compresskit.spec import RunSpec
    from compresskit.suite import Suite
    from compresskit.sweep import Swept


def check(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A suite file, or a shipped suite: demo-fast.")
    ],
    against: Annotated[
        Path, typer.Option("--against", metavar="BASELINE", help="Folder of baseline records.")
    ],
    update: Annotated[
        bool, typer.Option("--update", help="Make the new records the baseline.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the new records. [default: a temporary one, kept on failure]",
            show_default=False,
        ),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit XML report here.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Append a Markdown summary to this file.")
    ] = None,
    tier: Tiers = None,
    tolerance: Tolerances = None,
    every: Every = False,
    as_json: options.AsJson = False,
) -> None:
    """Run a suite and compare it with a committed baseline: the gate for a CI job.

    A clock that got worse is measured once more before it is believed. Exit code 0: passed;
    1: regression; 2: bad usage; 3: records are invalid or must not be compared.

    [bold]Examples[/bold]

      compresskit check benchmarks/ci.toml --against benchmarks/baselines/ci --update

      compresskit check benchmarks/ci.toml --against benchmarks/baselines/ci --junit check.xml

      compresskit check benchmarks/ci.toml --against benchmarks/baselines/ci --tier exact --tier quality
    """
    from compresskit import compare as comparing, suite as suites

    loaded = _suite(suite)
    specs, allowed = suites.resolve(loaded), read_tolerances(tolerance)
    tiers = read_tiers(tier)
    # Whatever is wrong with the request is found before anything is measured.
    comparing.compare([], [], tolerances=allowed)
    old = _baseline(against, suite, specs, update=update)
    with _folder(out) as folder:
        swept = _measure(loaded, specs, folder)
        found = comparing.compare(
            list(old.values()), swept.records, tiers=tiers, tolerances=allowed
        )
        if not update:
            found = _confirmed(found, loaded, old, folder / "again", tiers, allowed)
        passed = not (found.failures() or found.refused or found.only_base)
        _write(found, junit, markdown, title=f"compresskit check {loaded.name}", passed=passed)
        show(found, passed=passed, every=every, as_json=as_json, gate=True)
        if update:
            _update(against, old, swept)
            return
        leave(found)
        if found.only_base:
            raise typer.Exit(Exit.FAILED)


def _suite(given: str) -> Suite:
    """Read a suite from a file, or one that is shipped under that name."""
    from compresskit import suite as suites

    path = Path(given)
    shipped = suites.shipped(given)
    return suites.read(shipped if not path.exists() and shipped.exists() else path)


def _baseline(
    against: Path, suite: str, specs: Sequence[RunSpec], *, update: bool
) -> dict[Path, Record]:
    """Read the baseline; without one, say how to make it."""
    from compresskit import compare as comparing
    from compresskit.errors import UsageError
    from compresskit.store import files

    if update and (not against.exists() or not files(against)):
        return {}
    make = f"Make it with: compresskit check {suite} --against {against} --update"
    if not against.exists() or not files(against):
        raise UsageError(f"no baseline in {against}. {make}")
    old = comparing.load(against)
    digests = {spec.digest() for spec in specs}
    if not update and not any(record.digest in digests for record in old.values()):
        raise UsageError(f"the baseline in {against} holds no run of this suite. {make}")
    return old


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """The folder for new records: a temporary one is kept, and named, unless all went well."""
    import shutil
    import sys
    import tempfile

    if out is not None:
        yield out
        return
    folder = Path(tempfile.mkdtemp(prefix="compresskit-check-"))
    kept = True
    try:
        yield folder
        kept = False
    finally:
        if kept:
            print(f"The new records are kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _measure(suite: Suite, specs: list[RunSpec], out: Path) -> Swept:
    from compresskit.cli.run import sweep_with_progress

    return sweep_with_progress(specs, suite=suite.name, out=out, resume=False, prices=suite.prices)


def _confirmed(
    found: Comparison,
    suite: Suite,
    old: dict[Path, Record],
    out: Path,
    tiers: Collection[Tier],
    allowed: dict[str, float],
) -> Comparison:
    """Measure rows with a worse clock once more and keep what both sessions say."""
    from compresskit import compare as comparing
    from compresskit.cli.progress import console
    from compresskit.compare import again

    specs = again.doubtful(found)
    if not specs:
        return found
    console.print(f"a clock got worse in {len(specs)} records: measuring them again", markup=False)
    second = _measure(suite, specs, out)
    repeated = comparing.compare(
        list(old.values()), second.records, tiers=tiers, tolerances=allowed
    )
    return again.confirm(found, repeated)


def _write(
    found: Comparison, junit: Path | None, markdown: Path | None, *, title: str, passed: bool
) -> None:
    """Write the reports for CI systems; a summary is appended, as job pages want it."""
    from compresskit import store
    from compresskit.errors import RunError
    from compresskit.report.comparison import junit as xml, markdown as summary

    if junit is not None:
        store.write_text(junit, xml.render(found, title=title))
    if markdown is not None:
        try:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            with markdown.open("a", encoding="utf-8") as file:
                file.write(summary.render(found, title=title, passed=passed))
        except OSError as error:
            raise RunError(f"cannot write {markdown}: {error.strerror or error}.") from None


def _update(against: Path, old: dict[Path, Record], swept: Swept) -> None:
    """Write the new baseline and say what became of it."""
    import sys

    from compresskit.compare import baseline

    written = baseline.update(against, old, swept.records, machine=swept.folder.parent.name)
    print(
        f"baseline {against}: {len(written.replaced)} records replaced, {len(written.added)} new, "
        f"{len(old) - len(written.replaced)} kept as they were",
        file=sys.stderr,
    )
