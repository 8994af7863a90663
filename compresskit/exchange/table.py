"""Peers as tables: one per tool, in the order of the files, never sorted by a number.

There is no ratio and no verdict of ours: the conditions were the other tool's. A result that its own
tool calls INVALID is listed without numbers.
"""

from __future__ import annotations

import csv as comma
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table as Grid
from rich.text import Text

from compresskit.exchange.peers import OWN
from compresskit.metrics import METRICS
from compresskit.record import Measured
from compresskit.units import Unit, format_quantity, significant

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pydantic import JsonValue
    from rich.console import Console

    from compresskit.exchange.peers import Peer

HEADING = "imported from {tool} (other conditions: not compared with other rows)"
_LABEL_WIDTH = 28
_CONTEXT = ("model", "device", "batch", "prompt", "new")
_HEADINGS = {
    "ttft_s": "TTFT",
    "ttft_p99_s": "TTFT\np99",
    "tpot_s": "TPOT",
    "tpot_p99_s": "TPOT\np99",
    "itl_s": "ITL",
    "itl_p99_s": "ITL\np99",
    "e2e_s": "E2E",
    "prefill_tokens_per_s": "prefill\ntok/s",
    "decode_tokens_per_s_per_seq": "decode\ntok/s/seq",
    "output_tokens_per_s": "output\ntok/s",
    "total_tokens_per_s": "total\ntok/s",
    "requests_per_s": "requests\n/s",
    "draft_acceptance_rate": "accepted",
    "mean_acceptance_length": "accepted\nlength",
    "weights_bytes": "weights",
    "bits_per_byte": "bits per\nbyte",
}
"""Our names in the order of the columns; the denominators are those of `definitions`."""


@dataclass(frozen=True)
class Section:
    """The peers of one tool as text: a header and one line of cells per peer."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sections(peers: Iterable[Peer]) -> Iterator[Section]:
    """Yield one table per tool, with the columns that it has something to show in."""
    by_tool: dict[str, list[Peer]] = {}
    for one in peers:
        by_tool.setdefault(one.tool, []).append(one)
    for tool, group in by_tool.items():
        metrics, stated = _keys(group)
        facts = [_facts(one) for one in group]
        shown = [name for name in _CONTEXT if len({fact[name] for fact in facts}) > 1]
        shared = [f"{name} {facts[0][name]}" for name in _CONTEXT if name not in shown]
        shared = [words for words in shared if not words.endswith(" ")]
        verdict = ["verdict"] if any(one.verdict for one in group) else []
        rows = [
            (
                one.label,
                *(fact[name] for name in shown),
                *(one.verdict or "" for _ in verdict),
                *(_metric(one, name) for name in metrics),
                *(_stated(one, name) for name in stated),
            )
            for one, fact in zip(group, facts, strict=True)
        ]
        named = (_HEADINGS.get(name, name) for name in metrics)
        columns = ("result", *shown, *verdict, *named, *stated)
        heading = "; ".join([HEADING.format(tool=tool), *shared])
        yield Section(heading, columns, tuple(rows))


def _keys(group: Sequence[Peer]) -> tuple[list[str], list[str]]:
    """Columns in our order, then the tool's own in the order of appearance."""
    found = {name for one in group for name in one.metrics}
    metrics = [name for name in _HEADINGS if name in found]
    metrics += sorted(found.difference(metrics))
    return metrics, list(dict.fromkeys(name for one in group for name in one.stated))


def _facts(one: Peer) -> dict[str, str]:
    return {
        "model": one.model or "",
        "device": one.device or "",
        "batch": "" if one.batch is None else str(one.batch),
        "prompt": "" if one.prompt_tokens is None else f"{one.prompt_tokens:g}",
        "new": "" if one.new_tokens is None else f"{one.new_tokens:g}",
    }


def _metric(one: Peer, name: str) -> str:
    reading = one.metrics.get(name)
    if one.verdict == "INVALID":
        return "invalid"
    if not isinstance(reading, Measured):
        return "n/a" if reading is not None else ""
    rate = reading.unit in (Unit.TOKEN_PER_SECOND, Unit.COUNT, Unit.BIT_PER_BYTE)
    return significant(reading.value) if rate else format_quantity(reading.value, reading.unit)


def _stated(one: Peer, name: str) -> str:
    found = one.stated.get(name)
    if found is None:
        return ""
    if one.verdict == "INVALID":
        return "invalid"
    spread = "" if found.stderr is None else f" ± {significant(found.stderr, 2)}"
    return f"{significant(found.value)}{spread}"


def rich(peers: Iterable[Peer], console: Console) -> None:
    """Print the tables on `console`; names from files are printed as text, never as markup.

    A table breaks between columns where the console is narrow: no number is cut.
    """
    for section in sections(peers):
        console.print(Text(section.heading, style="bold"))
        columns = list(zip(*section.rows, strict=True))
        label_width = min(_LABEL_WIDTH, 2 + max(map(cell_len, columns[0])))
        rest = list(range(1, len(columns)))
        while rest:
            room, count = console.width - label_width, 0
            for index in rest:
                words = (*section.columns[index].split("\n"), *columns[index])
                room -= 2 + min(_LABEL_WIDTH, max(map(cell_len, words)))
                if room < 0:
                    break
                count += 1
            here, rest = rest[: max(1, count)], rest[max(1, count) :]
            console.print(_grid(section, [0, *here]))
            console.print()


def _grid(section: Section, indices: list[int]) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index in indices:
        side: Literal["left", "right"] = "right" if index else "left"
        grid.add_column(
            Text(section.columns[index]), justify=side, max_width=_LABEL_WIDTH, overflow="fold"
        )
    for row in section.rows:
        grid.add_row(*(Text(row[index]) for index in indices))
    return grid


def markdown(peers: Iterable[Peer]) -> str:
    """Return the tables as Markdown, ending in a newline; empty without peers."""
    parts = []
    for section in sections(peers):
        heads = [column.replace("/\n", "/").replace("\n", " ") for column in section.columns]
        lines = [heads, ("---",) * len(section.columns), *section.rows]
        body = (
            "| " + " | ".join(cell if cell == "---" else _escape(cell) for cell in line) + " |"
            for line in lines
        )
        parts.append(f"**{_escape(section.heading)}**\n\n" + "\n".join(body))
    return "\n\n".join(parts) + "\n" if parts else ""


def _escape(words: str) -> str:
    for mark in "\\|*_`<>~":
        words = words.replace(mark, f"\\{mark}")
    return words


def document(peers: Iterable[Peer]) -> list[JsonValue]:
    """Return the peers for programs: as stored, full precision, a reason where a number is null."""
    return [one.model_dump(mode="json") for one in peers]


def csv(peers: Sequence[Peer]) -> str:
    """Return one line per number: tools differ in what they measure, lines do not."""
    out = io.StringIO()
    writer = comma.writer(out, lineterminator="\n")
    writer.writerow(
        ["tool", "label", *_CONTEXT, "verdict", "name", "value", "stderr", "unit", "note", "file"]
    )
    for one in peers:
        facts = [one.tool, one.label, *_facts(one).values(), one.verdict or ""]
        for name, reading in one.metrics.items():
            if isinstance(reading, Measured):
                number = [reading.value, "", reading.unit.value, reading.source]
            else:
                number = ["", "", "", getattr(reading, "reason", "")]
            writer.writerow([*facts, name, *number, one.file.name])
        for name, found in one.stated.items():
            stderr = "" if found.stderr is None else found.stderr
            writer.writerow(
                [*facts, name, found.value, stderr, "", f"{one.tool}'s own", one.file.name]
            )
    return out.getvalue()


def definitions(peers: Iterable[Peer]) -> dict[str, str]:
    """What the names of our metrics among `peers` mean."""
    names = {name for one in peers for name in one.metrics}
    return {
        name: METRICS[name].definition if name in METRICS else OWN[name][1]
        for name in sorted(names)
        if name in METRICS or name in OWN
    }
