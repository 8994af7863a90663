"""The formats by the names that the command line uses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from compresskit import validity
from compresskit.errors import Incomparable, RecordError, UnknownName, UsageError
from compresskit.exchange import exporters, importers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from compresskit.exchange.peers import Peer
    from compresskit.record import Record

LARGEST_FILE = 256 * 1024 * 1024
"""Bytes of a foreign file that are read at most; results of other tools are far smaller."""


@dataclass(frozen=True)
class Exporter:
    """How records become a file of another tool."""

    render: Callable[[Sequence[Record]], str]
    suffix: str
    one_run: bool = False
    """Whether the format holds a single run."""


EXPORTERS: Mapping[str, Exporter] = MappingProxyType(
    {
        "llama-bench": Exporter(exporters.llama_bench.render, ".jsonl"),
        "vllm": Exporter(exporters.vllm.render, ".json"),
        "optimum-benchmark": Exporter(exporters.optimum.render, ".json", one_run=True),
        "pytest-benchmark": Exporter(exporters.pytest_benchmark.render, ".json"),
        "mlperf": Exporter(exporters.mlperf.render, ".json"),
    }
)

IMPORTERS: Mapping[str, Callable[[importers.Source], list[Peer]]] = MappingProxyType(
    {
        "llama-bench": importers.llama_bench.read,
        "vllm": importers.vllm.read,
        "lm-eval": importers.lm_eval.read,
        "mlperf": importers.mlperf.read,
    }
)


class Usable(NamedTuple):
    """Records that another tool's format can carry, and why the others were left out."""

    records: list[Record]
    notes: list[str]


def usable(found: Iterable[Record]) -> Usable:
    """Keep the records with numbers that stand: other formats have no place for a verdict.

    Raises:
        Incomparable: there are results, but all are INVALID.
        UsageError: no run ended with numbers.
    """
    kept, notes, invalid = [], [], 0
    for one in found:
        verdict = validity.judge(one)
        if one.status != "ok":
            notes.append(f"left out: {one.digest} ({one.label}) was {one.status}")
        elif verdict.verdict == "INVALID":
            invalid += 1
            notes.append(f"left out: {one.digest} ({one.label}) is INVALID")
        elif one.simulated:
            notes.append(f"left out: {one.digest} ({one.label}) only simulates its saving")
        else:
            kept.append(one)
    if not kept and invalid:
        raise Incomparable("every result is INVALID; another tool's format could not say so.")
    if not kept:
        raise UsageError("none of these records holds numbers to export. " + "; ".join(notes))
    return Usable(kept, notes)


def exporter(name: str) -> Exporter:
    """Return the exporter called `name`; raise `UnknownName`."""
    if name not in EXPORTERS:
        raise UnknownName("export format", name, EXPORTERS)
    return EXPORTERS[name]


def read(path: Path, name: str) -> list[Peer]:
    """Read the results in `path`, a file of the tool called `name`.

    Raises:
        UnknownName: there is no such importer.
        RecordError: the file cannot be read, or it is not what that tool writes.
    """
    if name not in IMPORTERS:
        raise UnknownName("import format", name, IMPORTERS)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise RecordError(f"{path}: larger than {LARGEST_FILE} bytes; no tool writes that.")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read ({error}).") from None
    return parse(data, name, where=path.name)


def parse(data: bytes, name: str, *, where: str) -> list[Peer]:
    """Read the bytes of a file called `where`; raise `RecordError` as `read` does."""
    source = importers.Source(where, data, hashlib.sha256(data).hexdigest())
    found = IMPORTERS[name](source)
    if not found:
        raise RecordError(f"{where}: holds no result of {name}.")
    return found
