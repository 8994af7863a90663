"""A baseline: a folder of records that later runs are held against, kept under version control."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit import store, validity
from compresskit.compare.agree import MACHINE
from compresskit.errors import Incomparable, RunError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from compresskit.record import Record


class Written(NamedTuple):
    """Files of a baseline that were replaced, and those that are new."""

    replaced: list[Path]
    added: list[Path]


def update(
    folder: Path, old: Mapping[Path, Record], new: Sequence[Record], *, machine: str
) -> Written:
    """Write `new` into the baseline `folder`, which holds `old`.

    A record of the same spec and machine is replaced where it is; one of another machine stays,
    and the new one goes to a folder called `machine`. Each file is written whole or not at all,
    and none before all records are known to be sound.

    Raises:
        RunError: a run failed, or a file cannot be written.
        Incomparable: a record is INVALID.
    """
    for record in new:
        if record.status == "failed":
            raise RunError(f"{record.label} failed ({record.reason}): the baseline stays as it is.")
        verdict = validity.judge(record)
        if record.status == "ok" and verdict.verdict == "INVALID":
            raise Incomparable(
                f"{record.label} is INVALID ({verdict.reasons[0]}): the baseline stays as it is."
            )
    written = Written([], [])
    for record in new:
        same = [
            path
            for path, one in old.items()
            if one.digest == record.digest and MACHINE.read(one) == MACHINE.read(record)
        ]
        path = same[0] if same else _free(folder, record, old, machine)
        store.write_text(path, store.dumps(record))
        (written.replaced if same else written.added).append(path)
    return written


def _free(folder: Path, record: Record, old: Mapping[Path, Record], machine: str) -> Path:
    path = folder / f"{record.digest}.json"
    return folder / machine / path.name if path in old else path
