"""Run a list of specs one after the other and keep every record.

Each record is written when its run ends, so an interrupted sweep loses at most the run that was
under way. With `resume`, a spec whose record is already there is not run again, if the record is ok
or skipped and was made by the same code, packages and system: results that came with a clone, or
from before an upgrade, are measured anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from compresskit import artefact as artefacts, catalogue, device as devices, isolate
from compresskit.errors import RecordError, SpecError
from compresskit.hf import load
from compresskit.measure import environment, machine
from compresskit.store import load as load_record, save, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compresskit.hf.sources import Progress
    from compresskit.record import Environment, Record
    from compresskit.spec import RunSpec


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


def preflight(specs: Sequence[RunSpec], progress: Progress) -> None:
    """Find what would fail in every child: models, methods, devices, context lengths.

    Downloads and conversions happen here, once, with progress.

    Raises:
        UsageError: with one message, before anything runs.
    """
    for spec in specs:
        source = artefacts.find_model(spec.model, progress)
        devices.resolve(spec.device)
        catalogue.engine(spec.engine)
        catalogue.place(spec.stack)
        context = load.context_of(load.read_config(source.path))
        need = spec.workload.prompt_tokens + spec.workload.new_tokens
        if need > context:
            raise SpecError(
                f"prompt of {spec.workload.prompt_tokens} plus {spec.workload.new_tokens} new tokens is {need}, "
                f"more than the context of {spec.model.name} ({context}). Shorten workload.prompt_tokens."
            )


def run(
    specs: Sequence[RunSpec], *, suite: str, out: Path, resume: bool, watcher: Watcher
) -> Swept:
    """Run `specs` into `out/<machine>/<suite>/` and return their records.

    Raises:
        UsageError: the request cannot be honoured.
        RunError: a record cannot be written.
    """
    description = machine.describe(devices.resolve(specs[0].device))
    folder = out / description.id / suite
    write_text(folder.parent / "machine.json", description.model_dump_json(indent=1) + "\n")
    here = environment.describe()
    records = []
    for index, spec in enumerate(specs):
        watcher.begin(index, len(specs), catalogue.label(spec.stack, spec.engine.mode))
        kept = _kept(spec, folder, here) if resume else None
        record = kept or isolate.run(spec, watcher.phase)
        if kept is None:
            save(record, folder)
        watcher.end(record, reused=kept is not None)
        records.append(record)
    return Swept(folder, tuple(records))


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
    return record if there == here else None
