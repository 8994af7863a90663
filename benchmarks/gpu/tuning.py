"""Find a launch configuration by changing one thing at a time; pure search, no GPU in sight.

    start ──► every value of the first axis ──► keep the best ──► next axis ──► ... ──► again, until
              nothing changes or the rounds are over

A product of all axes would take hours of compiling; one axis at a time takes a few dozen configurations. The
start is what is used today, and another one takes its place only if it is faster by `MARGIN`: a table whose
entries differ by noise would be no better, only another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import resources
from math import exp, fsum, log
from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit_kernels.launch import Tile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Times = Callable[[Tile], "Sequence[float] | None"]
"""Seconds of a configuration on each of several shapes; None where it is wrong or cannot run."""

MARGIN = 0.02
ROUNDS = 2
AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "packed_one_row": {
        "columns": (16, 32, 64), "depth": (32, 64, 128), "warps": (4, 8), "waves": (1, 2, 4),
    },
    "packed_few_rows": {
        "columns": (32, 64), "warps": (2, 4, 8), "stages": (2, 3, 4), "waves": (1, 2, 3, 4),
    },
    "int8_product": {
        "columns": (64, 128, 256), "depth": (64, 128), "warps": (4, 8), "stages": (3, 4, 5),
        "waves": (1, 2, 4),
    },
}  # fmt: skip
"""What may change of each kind; rows a program stay those of the default, which goes by the class."""


class Found(NamedTuple):
    """The best configuration, and how many times as fast as the start it is."""

    tile: Tile
    gain: float | None
    """None: nothing was timed, the start stays."""
    tried: int


def default() -> dict[str, list[Tile]]:
    """The table of an unknown GPU."""
    file = resources.files("compresskit_kernels") / "tuned" / "default.json"
    table = json.loads(file.read_text("utf-8"))
    return {kind: [Tile(**entry) for entry in entries] for kind, entries in table.items()}


def search(start: Tile, axes: Mapping[str, Sequence[int]], times: Times) -> Found:
    """The fastest configuration that one change at a time leads to, by the geometric mean over shapes."""
    known: dict[Tile, Sequence[float] | None] = {start: times(start)}
    base = known[start]
    if base is None:  # not measured here: what is used today stays
        return Found(start, None, 1)
    best, gain = start, 1.0
    for _ in range(ROUNDS):
        before = best
        for axis, values in axes.items():
            for value in values:
                candidate = replace(best, **{axis: value})
                if candidate not in known:
                    known[candidate] = times(candidate)
                found = known[candidate]
                if found is not None and (faster := ratio(base, found)) > gain * (1 + MARGIN):
                    best, gain = candidate, faster
        if best == before:
            break
    return Found(best, gain, len(known))


def ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster than `base`: the geometric mean over the shapes."""
    logs = [log(one / two) for one, two in zip(base, other, strict=True)]
    return exp(fsum(logs) / len(logs))


def write(path: Path, table: Mapping[str, Sequence[Tile]]) -> None:
    """Write a table as `compresskit_kernels/tuned` holds them: one entry a line."""
    kinds = []
    for kind, entries in table.items():
        lines = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in entries)
        kinds.append(f"  {json.dumps(kind)}: [\n{lines}\n  ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("{\n" + ",\n".join(kinds) + "\n}\n", encoding="utf-8")
    draft.replace(path)


def kept(path: Path) -> dict[str, Any] | None:
    """A finished search of an earlier visit on a GPU, if it can be read."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Tile(**document["tile"])
        timed = document["gain"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return document if timed else None
