"""Measure a list of specs, those that may be compared side by side, and keep every record.

    specs ──► kept records (resume)
          └─► sessions: the dense rows and as many variants as fit into memory, in alternation

Each record is written as soon as it is complete, so an interrupted sweep loses at most the session
that was under way. With `resume`, a spec whose record is already there is not run again, if the
record is ok or skipped and was made by the same code, packages and system: results that came with
a clone, or from before an upgrade, are measured anew. A dense row that new variants need beside
them is measured again, and its record gets one more block.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import psutil

from compresskit import artefact as artefacts, catalogue, device as devices, pairing, runner
from compresskit.errors import RecordError, RunError, SpecError
from compresskit.hf import load, parallel
from compresskit.measure import environment, machine
from compresskit.pairing import Arm
from compresskit.store import load as load_record, save

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from compresskit.hf.sources import Progress
    from compresskit.record import Environment, Limits, Record
    from compresskit.spec import Prices, RunSpec


def always() -> bool:
    """Start every session."""
    return True


class Watcher(Protocol):
    """Told about a sweep's progress."""

    def begin(self, index: int, total: int, label: str) -> None:
        """A run starts."""

    def phase(self, phase: str, detail: str = "") -> None:
        """The current run enters a phase."""

    def end(self, record: Record, *, reused: bool) -> None:
        """A run ended, or its record was already there."""


@dataclass(frozen=True)
class Swept:
    """Records of a sweep, in order, and where they are."""

    folder: Path
    records: tuple[Record, ...]
    left: int = 0
    """Runs that were not started."""


def preflight(specs: Sequence[RunSpec], progress: Progress) -> None:
    """Find what would fail in every child: models, methods, devices, context lengths.

    Downloads and conversions happen here, once, with progress.

    Raises:
        UsageError: with one message, before anything runs.
    """
    for spec in specs:
        plan = artefacts.plan(spec, progress)
        context = load.context_of(load.read_config(plan.loaded.path))
        need = spec.workload.prompt_tokens + spec.workload.new_tokens
        if need > context:
            raise SpecError(
                f"prompt of {spec.workload.prompt_tokens} plus {spec.workload.new_tokens} new tokens is {need}, "
                f"more than the context of {plan.model.name} ({context}). Shorten workload.prompt_tokens."
            )


def run(
    specs: Sequence[RunSpec],
    *,
    suite: str,
    out: Path,
    resume: bool,
    watcher: Watcher,
    paired: bool = True,
    resident: int | None = None,
    prices: Prices | None = None,
    go_on: Callable[[], bool] = always,
) -> Swept:
    """Run `specs` into `out/<machine>/<suite>/` and return their records.

    With `paired`, rows are measured in alternation, at most `resident` at a time (default: as many
    as memory allows); without it one after the other, and nothing can be said about differences.
    `go_on` is asked before every session; after a no the sweep ends with the records that there are.

    Raises:
        UsageError: the request cannot be honoured.
        RunError: a record cannot be written.
    """
    described = machine.describe(devices.resolve(specs[0].device))
    folder = out / described.id / suite
    together = any(parallel.demands(spec.engine.placement) for spec in specs)
    first = all(parallel.first(spec.engine.placement) for spec in specs)
    description = machine.update(folder.parent, described) if first else described
    here = environment.describe()
    records: dict[str, Record] = {}
    if resume:
        records = {spec.digest(): kept for spec in specs if (kept := _kept(spec, folder, here))}
    extra = {"limits": description.limits, "prices": prices}
    bench = _Bench(folder, specs, records, watcher, extra, together=together, saves=first)
    bench.reuse()
    for arms in sessions(
        specs, frozenset(records), paired=paired and not together, resident=resident
    ):
        if not go_on():
            break
        bench.measure(arms)
    found = [records.get(spec.digest()) for spec in specs]
    return Swept(folder, tuple(one for one in found if one is not None), found.count(None))


@dataclass(frozen=True)
class _Bench:
    """A sweep under way."""

    folder: Path
    specs: Sequence[RunSpec]
    records: dict[str, Record]
    watcher: Watcher
    extra: dict[str, Limits | Prices | None]
    """What every record of the sweep is given beside its own measurements."""
    together: bool = False
    """This process shares its models with others: all run in it, one after the other."""
    saves: bool = True

    def reuse(self) -> None:
        """Say which records are kept."""
        for spec in self.specs:
            if (kept := self.records.get(spec.digest())) is not None:
                self._begin(spec)
                self.watcher.end(kept, reused=True)

    def measure(self, arms: Sequence[Arm]) -> None:
        """Run one session and save its records."""
        begun: set[int] = set()

        def notify(arm: int, phase: str, detail: str = "") -> None:
            if arm not in begun:
                begun.add(arm)
                self._begin(arms[arm].spec, again=arms[arm].speed_only)
            self.watcher.phase(f"{_label(arms[arm].spec)}: {phase}", detail)

        # Closed at once if a record cannot be saved or Ctrl-C comes: no process is left behind.
        started = (
            _here(arms, notify)
            if self.together
            else pairing.session(arms, notify, seed=arms[0].spec.seed)
        )
        with closing(started) as session:
            for index, record in session:
                arm = arms[index]
                whole = self._merged(arm, record).model_copy(update=self.extra)
                if self.saves:
                    save(whole, self.folder)
                self.records[arm.spec.digest()] = whole
                if not arm.speed_only:
                    self.watcher.end(whole, reused=False)

    def _begin(self, spec: RunSpec, *, again: bool = False) -> None:
        label = f"{_label(spec)}, once more beside others" if again else _label(spec)
        place = [other.digest() for other in self.specs].index(spec.digest())
        self.watcher.begin(place, len(self.specs), label)

    def _merged(self, arm: Arm, record: Record) -> Record:
        """A repeat appends its block; a repeat that failed leaves the record as it was."""
        before = self.records.get(arm.spec.digest())
        if not arm.speed_only or before is None:
            return record
        if record.status != "ok":
            return before
        return runner.finish(before.model_copy(update={"blocks": (*before.blocks, *record.blocks)}))


def _here(
    arms: Sequence[Arm], notify: Callable[..., None]
) -> Generator[tuple[int, Record], None, None]:
    """Run the arms in this process, which other processes step with.

    Raises:
        RunError: a run failed here. The others may be waiting for it, so all have to end.
    """
    for index, arm in enumerate(arms):
        record = runner.run(arm.spec, partial(notify, index))
        if record.status == "failed":
            raise RunError(f"{_label(arm.spec)}: {record.reason}")
        yield index, record


def _label(spec: RunSpec) -> str:
    return catalogue.label(spec.stack, spec.engine.manner)


def sessions(
    specs: Sequence[RunSpec], done: frozenset[str], *, paired: bool, resident: int | None
) -> Iterator[list[Arm]]:
    """Cut the runs that are not `done` (digests) into sessions, each with its dense rows."""
    known = set(done)
    groups: dict[str, list[RunSpec]] = {}
    for spec in specs:
        groups.setdefault(_comparable(spec), []).append(spec)
    for group in groups.values():
        todo = [spec for spec in group if spec.digest() not in known]
        dense = [spec for spec in group if not spec.stack]
        if not paired:
            yield from ([Arm(spec)] for spec in todo)
            continue
        variants = [spec for spec in todo if spec.stack]
        room = max(1, (resident or _resident(group[0])) - len(dense))
        chunks = [variants[at : at + room] for at in range(0, len(variants), room)]
        if not chunks and any(not spec.stack for spec in todo):
            chunks = [[]]
        for chunk in chunks:
            yield [
                *(Arm(spec, speed_only=spec.digest() in known) for spec in dense),
                *map(Arm, chunk),
            ]
            known |= {spec.digest() for spec in (*dense, *chunk)}


def _comparable(spec: RunSpec) -> str:
    """Runs that differ in stack and mode only belong side by side."""
    engine = {**spec.engine.model_dump(mode="json"), "mode": "eager"}
    return spec.replace(stack=(), engine=engine).model_dump_json()


MOST_RESIDENT = 12
_OF_WEIGHTS, _RUNTIME_BYTES = 2.5, 1.5e9
"""What an idle arm may hold: its weights with a packed copy, and a process with torch in it."""


def _resident(spec: RunSpec) -> int:
    """How many arms fit into memory at once; at least two, or nothing could be compared."""
    weights = artefacts.outline(spec.model, artefacts.find_model(spec.model)).bytes
    need = _OF_WEIGHTS * weights + _RUNTIME_BYTES
    device = devices.resolve(spec.device)
    free = min(psutil.virtual_memory().available, 0.85 * device.memory_bytes)
    return max(2, min(MOST_RESIDENT, int(free / need)))


def _kept(spec: RunSpec, folder: Path, here: Environment) -> Record | None:
    path = folder / f"{spec.digest()}.json"
    if not path.exists():
        return None
    try:
        record = load_record(path)
    except RecordError:
        # A broken record is run again and overwritten; `table` is where it is complained about.
        return None
    if record.status not in ("ok", "skipped") or record.environment is None:
        return None
    # Variables are set by each child for itself.
    there = record.environment.model_copy(update={"variables": here.variables})
    return record if there == here and _same_student(spec, record) else None


def _same_student(spec: RunSpec, record: Record) -> bool:
    """Whether the model that stood in for the run's is still what it was: folders are taught anew."""
    told = record.facts.get("student")
    if not isinstance(told, dict):
        return True
    return told.get("revision") == artefacts.plan(spec).loaded.revision
