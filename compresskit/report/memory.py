"""Peaks of memory taken apart: per record and phase, the parts and what they leave over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compresskit.metrics import METRICS
from compresskit.metrics.cache import CACHE, changed
from compresskit.metrics.memory import unattributed
from compresskit.record import Unavailable
from compresskit.units import Unit, format_quantity, significant

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console

    from compresskit.record import MemoryPass, Phase, Reading, Record


@dataclass(frozen=True)
class Line:
    """One part of a peak."""

    part: str
    reading: Reading
    share: float | None
    """Of the peak; null where one of the two is not known."""
    note: str = ""


@dataclass(frozen=True)
class Account:
    """One phase of one record."""

    phase: str
    counter: str
    peak: Reading
    lines: tuple[Line, ...]
    others: tuple[tuple[str, Reading], ...]
    """Peaks of the other counters."""


def accounts(memory: MemoryPass) -> Iterator[Account]:
    """Take the peaks of one pass apart; phases without a counter of their own have no parts."""
    for name, phase in memory.phases.items():
        counter = phase.counter or next(iter(phase.peaks), "")
        peak = phase.peaks.get(counter, Unavailable(reason="not read"))
        yield Account(
            phase=name,
            counter=counter,
            peak=peak,
            lines=tuple(_lines(phase, peak)),
            others=tuple((key, one) for key, one in phase.peaks.items() if key != counter),
        )


def _lines(phase: Phase, peak: Reading) -> Iterator[Line]:
    for part, reading in phase.parts.items():
        yield Line(part, reading, _share(reading, peak))
    rest = unattributed(phase)
    note = f"holds what could not be read: {', '.join(rest.missing)}" if rest.missing else ""
    yield Line("unattributed", rest.reading, _share(rest.reading, peak), note)


def _share(reading: Reading, peak: Reading) -> float | None:
    if reading.value is None or not peak.value:
        return None
    return reading.value / peak.value


def document(records: Iterable[Record]) -> dict[str, Any]:
    """The same as JSON; shares as fractions."""
    return {
        "records": [
            {
                "digest": record.digest,
                "label": record.label,
                "mode": record.spec.engine.mode,
                "model": record.spec.model.name,
                **_pass(memory),
                **_cache(record),
            }
            for record in records
            for memory in _passes(record)
        ]
    }


def _pass(memory: MemoryPass) -> dict[str, Any]:
    return {
        "weights_bytes": memory.weights_bytes,
        "cache_bytes": memory.cache_bytes,
        "moved_bytes": memory.moved_bytes,
        "operations_per_step": memory.operations_per_step,
        "phases": {
            account.phase: {
                "counter": account.counter,
                "peak": account.peak.model_dump(mode="json"),
                "parts": [
                    {
                        "part": line.part,
                        **line.reading.model_dump(mode="json"),
                        "share": line.share,
                        **({"note": line.note} if line.note else {}),
                    }
                    for line in account.lines
                ],
                "other_peaks": {key: one.model_dump(mode="json") for key, one in account.others},
            }
            for account in accounts(memory)
        },
    }


def _cache(record: Record) -> dict[str, Any]:
    """Asked for, held and read, where a method has changed the cache."""
    if not changed(record):
        return {}
    asked = {"cache": record.facts.get("cache"), "cache_nominal": record.facts["cache_nominal"]}
    return asked | {one.name: one.value(record).model_dump(mode="json") for one in CACHE}


def _passes(record: Record) -> list[MemoryPass]:
    """The last block's pass: bytes do not vary between blocks."""
    found = [block.passes.memory for block in record.blocks if block.passes.memory is not None]
    return found[-1:]


def render(records: Iterable[Record], console: Console) -> None:
    """Print one table per record: parts down, phases across."""
    for record in records:
        passes = _passes(record)
        name = f"{record.spec.model.name}  {record.label}  {record.spec.engine.mode}"
        if not passes:
            console.print(
                f"{name}: no memory pass ({record.reason or record.status})", markup=False
            )
            continue
        for memory in passes:
            _one(name, memory, console, _cache_lines(record))


def _cache_lines(record: Record) -> Iterator[str]:
    """The same in words; what is not known says why."""
    if not changed(record):
        return
    told = {
        "asked for": ("cache_nominal_ratio", "the model's own / {}"),
        "held": ("cache_achieved_ratio", "the model's own / {}"),
        "bits per number": ("cache_effective_bits", "{}"),
        "at its peak": ("cache_peak_bytes", "{}"),
        "touched by one decode step": ("cache_bytes_read_per_token", "{} a row"),
    }
    for what, (name, words) in told.items():
        reading = METRICS[name].value(record)
        if isinstance(reading, Unavailable):
            yield f"cache, {what}: n/a ({reading.reason})"
            continue
        unit = Unit.BYTE if reading.unit is Unit.BYTE_PER_TOKEN else reading.unit
        shown = (
            format_quantity(reading.value, unit)
            if unit is Unit.BYTE
            else significant(reading.value)
        )
        yield f"cache, {what}: {words.format(shown)}"


def _one(name: str, memory: MemoryPass, console: Console, cache: Iterable[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(accounts(memory))
    grid = Table(box=box.SIMPLE_HEAD, title=Text(name, style="bold"), title_justify="left")
    grid.add_column("")
    for account in columns:
        grid.add_column(f"{account.phase}\n{account.counter}", justify="right")
    grid.add_row("peak", *(_cell(account.peak, None) for account in columns), style="bold")
    # In the order of the fullest phase: a phase may lack parts, but none has an order of its own.
    fullest = max((account.lines for account in columns), key=len, default=())
    parts = [line.part for line in fullest]
    for part in dict.fromkeys([*parts, *(line.part for one in columns for line in one.lines)]):
        cells = []
        for account in columns:
            line = next((one for one in account.lines if one.part == part), None)
            cells.append("" if line is None else _cell(line.reading, line.share))
        grid.add_row(part, *cells)
    console.print(grid)
    for kind, held in (("weights", memory.weights_bytes), ("cache", memory.cache_bytes)):
        inside = ", ".join(f"{key} {_bytes(size)}" for key, size in held.items())
        console.print(Text(f"{kind}: {_bytes(sum(held.values()))} ({inside})"))
    for told in cache:
        console.print(Text(told))
    if memory.moved_bytes:
        moved = sum(memory.moved_bytes.values())
        console.print(Text(f"read by one decode step: {_bytes(moved)}"))
    for note in dict.fromkeys(_notes(columns)):
        console.print(Text(note, style="dim"))
    console.print()


def _notes(columns: list[Account]) -> Iterator[str]:
    for account in columns:
        for line in account.lines:
            if isinstance(line.reading, Unavailable):
                yield f"{account.phase}, {line.part}: {line.reading.reason}"
            elif line.note:
                yield f"{account.phase}, {line.part} {line.note}"


def _cell(reading: Reading, share: float | None) -> str:
    if reading.value is None:
        return "n/a"
    about = "~" if reading.kind == "estimated" else ""
    fraction = "" if share is None else f" {share:5.1%}"
    return f"{about}{_bytes(reading.value)}{fraction}"


def _bytes(size: float) -> str:
    return format_quantity(size, Unit.BYTE)
