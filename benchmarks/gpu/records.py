"""One JSON document per operation and shape, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.arms import Entry

SCHEMA = 1


class Store:
    """The folder of the records: `<op>/<shape>.json`."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Keep records under `folder`; `about` goes into each of them."""
        self.folder = folder
        self.about = about

    def path(self, entry: Entry) -> Path:
        """Where an entry's record lies."""
        return self.folder / entry.op / f"{entry.slug}.json"

    def has(self, entry: Entry) -> bool:
        """Whether it is finished, by a run of the same sort: a dry run's record counts only there."""
        try:
            record = json.loads(self.path(entry).read_text())
        except (OSError, ValueError):
            return False
        return bool(record["about"]["dry_run"] == self.about["dry_run"])

    def write(self, entry: Entry, arms: list[dict[str, Any]]) -> None:
        """Write through a second file, so that a run cut off leaves no half record."""
        path = self.path(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "schema": SCHEMA,
            "op": entry.op,
            "shape": entry.shape,
            "baseline": entry.baseline,
            "resident": entry.resident,
            "arms": arms,
            "about": self.about,
        }
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        draft.replace(path)

    def read(self) -> list[dict[str, Any]]:
        """All records of the folder, in the order of their paths."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*/*.json"))]
