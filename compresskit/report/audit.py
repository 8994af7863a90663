"""The audit of a record on paper: bits, bytes and storage of every kind of module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.units import Unit, format_quantity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from compresskit.record import Record


def lines_of(record: Record) -> list[dict[str, Any]]:
    """The audit that is stored in a record; empty in records older than it."""
    found = record.facts.get("audit")
    return [line for line in found if isinstance(line, dict)] if isinstance(found, list) else []


def document(records: Iterable[Record]) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "records": [
            {
                "digest": record.digest,
                "label": record.label,
                "mode": record.spec.engine.mode,
                "model": record.spec.model.name,
                "audit": lines_of(record),
            }
            for record in records
        ]
    }


def render(records: Iterable[Record], console: Console) -> None:
    """Print one table per record: modules down, largest first, and their sum."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for record in records:
        name = f"{record.spec.model.name}  {record.label}  {record.spec.engine.mode}"
        lines = lines_of(record)
        if not lines:
            console.print(f"{name}: no audit ({record.reason or record.status})", markup=False)
            continue
        grid = Table(box=box.SIMPLE_HEAD, title=Text(name, style="bold"), title_justify="left")
        grid.add_column("modules", overflow="fold")
        for heading in ("parameters", "bytes", "bits"):
            grid.add_column(heading, justify="right", no_wrap=True)
        grid.add_column("stored as (bits a weight)", overflow="fold")
        for line in lines:
            grid.add_row(
                Text(_modules(line)),
                f"{line['parameters']:,}",
                format_quantity(line["bytes"], Unit.BYTE),
                "–" if line["bits"] is None else f"{line['bits']:.2f}",
                Text(_storage(line)),
            )
        grid.add_row("sum", *_sum(lines), "", style="bold")
        console.print(grid)


def _modules(line: dict[str, Any]) -> str:
    times = f" ×{line['count']}" if line["count"] > 1 else ""
    blocks = f" (blocks {line['blocks']})" if "blocks" in line else ""
    return f"{line['modules']}{times}{blocks}"


def _storage(line: dict[str, Any]) -> str:
    parts = [line["storage"]]
    if line["implementation"] not in ("", "torch"):
        parts.append(line["implementation"])
    return "; ".join([*parts, *([line["note"]] if "note" in line else [])])


def _sum(lines: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Parameters of the model (copies aside), all bytes, and those over these."""
    nbytes = sum(line["bytes"] for line in lines)
    count = sum(line["parameters"] for line in lines if "note" not in line)
    return (
        f"{count:,}",
        format_quantity(nbytes, Unit.BYTE),
        f"{8 * nbytes / count:.2f}" if count else "–",
    )
