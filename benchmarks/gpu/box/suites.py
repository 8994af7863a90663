"""Suites of this folder on a model: resolved, run side by side until the time is up, and shown.

    suites/NAME.toml  ->  specs of one model  ->  less what cannot run here  ->  sweep  ->  table

Rows of a library that is not installed are left out with a reason, since the others can do without.
For a dry run the same rows are made small; nothing else about them changes.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.gpu import crossover
from compresskit import suite as suites, sweep
from compresskit.cli.progress import SweepProgress, source_progress
from compresskit.report import join, markdown, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.gpu.box.job import Job
    from compresskit.record import Record
    from compresskit.spec import RunSpec

FOLDER = Path(__file__).resolve().parents[1] / "suites"
PACKAGES = {"quant/torchao": "torchao", "quant/bnb4": "bitsandbytes"}
"""What a method of another library needs."""
DRY_BATCHES = {1: 1, 4: 2, 16: 2, 64: 3}
DRY_TOKENS = 24


class Rows(NamedTuple):
    """Specs that can run here, and why others cannot."""

    specs: list[RunSpec]
    left_out: list[str]


def rows(name: str, model: str, job: Job) -> Rows:
    """Specs of the suite called `name` on `model`."""
    document = suites.read(FOLDER / f"{name}.toml").model_dump(mode="json", exclude_defaults=True)
    document |= {"model": model, "device": "cpu" if job.is_dry else "cuda"}
    specs = suites.resolve(suites.Suite.decode(document, where=name))
    if job.is_dry:
        specs = suites.unique(small(spec) for spec in specs)
    kept, left_out = [], []
    for spec in specs:
        lacking = _lacking(spec, job)
        if lacking is None:
            kept.append(spec)
        else:
            left_out.append(f"{spec.label()}: {lacking}")
    return Rows(kept, left_out)


def _lacking(spec: RunSpec, job: Job) -> str | None:
    for method in spec.stack:
        package = PACKAGES.get(method.name)
        if package in job.without:
            return f"left out as asked ({package})"
        if package is not None and find_spec(package) is None:
            return f"{package} is not installed"
    return None


def small(spec: RunSpec) -> RunSpec:
    """The row in seconds on a CPU: few tokens, few repetitions, eager (compiling takes long)."""
    workload, protocol = spec.workload, spec.protocol
    batches = sorted({DRY_BATCHES[size] for size in workload.batch_sizes})
    return spec.replace(
        engine={"name": spec.engine.name},
        workload={
            **workload.model_dump(mode="json"),
            # Several contexts stay several.
            "prompt_tokens": DRY_TOKENS + (8 if workload.prompt_tokens > 4096 else 0),
            "new_tokens": 4,
            "batch_sizes": batches,
        },
        protocol={
            **protocol.model_dump(mode="json"),
            "repeats": 1,
            "warmups": 1,
            "energy_seconds": 0.05,
            "energy_windows": 1,
        },
        quality={
            "protocol": "window", "window": 32, "tokens": 32, "greedy_prompts": 1, "greedy_tokens": 4,
        },
    )  # fmt: skip


class Outcome(NamedTuple):
    """Records of a stage, and what became of the rest."""

    records: tuple[Record, ...]
    left: int
    """Runs for which there was no time."""
    left_out: tuple[str, ...]

    def code(self) -> int:
        """1 where a run failed; what was skipped or had no time is no failure."""
        return 1 if any(record.status == "failed" for record in self.records) else 0


def run(
    names: Iterable[str],
    models: Sequence[str],
    job: Job,
    *,
    paired: bool = True,
    resident: int | None = None,
) -> Outcome:
    """Run these suites on these models, each with a progress line a row, until the time is up."""
    records: list[Record] = []
    left, left_out = 0, []
    for name in names:
        for model in models:
            found = rows(name, model, job)
            left_out += found.left_out
            with source_progress() as report:
                sweep.preflight(found.specs, report)
            with SweepProgress() as watcher:
                swept = sweep.run(
                    found.specs,
                    suite=f"gpu-{name}",
                    out=job.out,
                    resume=True,
                    watcher=watcher,
                    paired=paired,
                    resident=job.resident or resident,
                    go_on=job.deadline.fits,
                )
            records += swept.records
            left += swept.left
    return Outcome(tuple(records), left, tuple(dict.fromkeys(left_out)))


def show(outcome: Outcome) -> None:
    """Print the table of the records, where methods stop or begin to pay, and what is missing."""
    if outcome.records:
        print(markdown.render(table.build(join.of(outcome.records))))
    if crossing := crossover.of(outcome.records):
        print(crossover.render(crossing))
    for reason in outcome.left_out:
        print(f"left out: {reason}")
    if outcome.left:
        print(f"no time for {outcome.left} runs; the same command goes on with them")
