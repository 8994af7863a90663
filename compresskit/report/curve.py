"""A cost curve on the terminal: a block of columns for every length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.units import Unit, format_quantity

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {"better": " ▲", "worse": " ▼", "same": " =", "inconclusive": " ?"}


def render(found: dict[str, Any], console: Console) -> None:
    """Print times, bytes, break-even and, if asked for, the batch that fits."""
    from rich.table import Table

    for title, cell in (
        ("ms per decode step (× dense)", _time),
        ("bytes held by the cache", _held),
    ):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("cache")
        for tokens in found["lengths"]:
            table.add_column(f"{int(tokens):,}", justify="right")
        for name in found["rows"]:
            table.add_row(name, *(cell(rows[name]) for rows in found["lengths"].values()))
        console.print(table)
        console.print()
    for name, words in found["break_even"].items():
        console.print(f"{name}: faster than the dense cache {_faster(words)}", highlight=False)
    if "reachable_batch_estimated" in found:
        memory = format_quantity(found["memory_bytes"], Unit.BYTE)
        table = Table(
            title=f"\nsequences that fit into {memory} (estimated: weights and caches alone)",
            title_justify="left", box=None, pad_edge=False,
        )  # fmt: skip
        table.add_column("cache")
        for tokens in found["lengths"]:
            table.add_column(f"{int(tokens):,}", justify="right")
        for name, by_length in found["reachable_batch_estimated"].items():
            table.add_row(name, *(f"{fits:,}" for fits in by_length.values()))
        console.print(table)
    console.print(
        "\nCaches were filled with random keys and values: cost is measured here, not quality. "
        "▲ better; ▼ worse; = the same; ? inconclusive (paired exact test, p < 0.002, beyond 1.05).",
        highlight=False,
    )


def _time(row: dict[str, Any]) -> str:
    spent = f"{1000 * row['median_seconds']:.2f}"
    if "ratio" not in row:
        return spent
    return f"{spent} ({row['ratio']:.2f}{_MARKS[row['verdict']]})"


def _held(row: dict[str, Any]) -> str:
    return format_quantity(sum(row["cache_bytes"].values()), Unit.BYTE)


def _faster(words: str) -> str:
    return words if words.startswith("not") else f"from a length {words}"
