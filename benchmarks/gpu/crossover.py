"""At which batch does a method stop or begin to pay, in time and in joules? Read off the records.

    dense rows of a batch   the best of all modes: the fastest, or the one with the fewest joules
    ratio                   tokens/s over dense tokens/s; dense joules a token over joules a token
    pays                    from 1.05 on, the factor below which rows count as equal elsewhere, too

Weight-only formats read fewer bytes, which pays while a step waits for memory, so they stop somewhere; 8-bit
activations calculate faster, so they begin somewhere. Only measured batches are spoken of: between two
of them nothing is interpolated. Ratios are of medians (joules: of totals); whether a difference is more than
noise is said by the table of the rows, not here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from compresskit.metrics import METRICS, decode_at, main_batch
from compresskit.metrics.energy import provenance
from compresskit.report.labels import clean, short_label
from compresskit.stats.verdict import FACTOR

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from compresskit.record import Reading, Record

Quantity = Literal["decode speed", "joules a decoded token", "joules a prompt token"]
ENERGY: dict[Quantity, str] = {
    "joules a decoded token": "j_per_decode_token",
    "joules a prompt token": "j_per_prefill_token",
}


class Point(NamedTuple):
    """One batch size: how many times better than dense."""

    batch: int
    ratio: float

    @property
    def pays(self) -> bool:
        """Whether it is better by more than the practical factor."""
        return self.ratio >= FACTOR


@dataclass(frozen=True)
class Crossing:
    """One row against dense, over the batch sizes."""

    heading: str
    """Model, type, device and workload, and what about them is made up."""
    label: str
    quantity: Quantity
    points: tuple[Point, ...]
    """By batch; at least one."""

    def words(self) -> str:
        """Where it pays, in words that hold of the measured sizes."""
        paying = [point.pays for point in self.points]
        sizes = [point.batch for point in self.points]
        if len(sizes) == 1:
            return (
                f"{'pays' if paying[0] else 'does not pay'} at {sizes[0]}, the only size measured"
            )
        if all(paying):
            return f"pays at every size from {sizes[0]} to {sizes[-1]}"
        if not any(paying):
            return f"pays at no size from {sizes[0]} to {sizes[-1]}"
        first, last = paying.index(True), len(paying) - 1 - paying[::-1].index(True)
        if not all(paying[first : last + 1]):
            named = ", ".join(str(size) for size, pays in zip(sizes, paying, strict=True) if pays)
            return f"pays at {named} only"
        begins = f"from {sizes[first]}, not at {sizes[first - 1]}" if first else ""
        ends = f"up to {sizes[last]}, not at {sizes[last + 1]}" if last + 1 < len(sizes) else ""
        return "pays " + "; ".join(filter(None, (begins, ends)))


class _Value(NamedTuple):
    group: str
    heading: str
    label: str | None
    """None: dense."""
    quantity: Quantity
    batch: int
    reading: Reading


def of(records: Iterable[Record]) -> list[Crossing]:
    """Every row that has a dense one beside it at some batch size, in the order of the records."""
    values = [value for record in records if _counts(record) for value in _values(record)]
    dense: dict[tuple[str, Quantity, int], list[_Value]] = defaultdict(list)
    for value in values:
        if value.label is None:
            dense[value.group, value.quantity, value.batch].append(value)
    rows: dict[tuple[str, str, Quantity], list[Point]] = defaultdict(list)
    headings: dict[str, str] = {}
    for value in values:
        if value.label is None:
            continue
        ratio = _ratio(value, dense[value.group, value.quantity, value.batch])
        if ratio is not None:
            headings[value.group] = value.heading
            rows[value.group, value.label, value.quantity].append(Point(value.batch, ratio))
    return [
        Crossing(headings[group], label, quantity, tuple(sorted(points)))
        for (group, label, quantity), points in rows.items()
    ]


def _counts(record: Record) -> bool:
    judged = record.validity
    return (
        record.status == "ok"
        and not record.simulated
        and (judged is None or judged.verdict != "INVALID")
    )


def _values(record: Record) -> Iterator[_Value]:
    def value(quantity: Quantity, batch: int, reading: Reading) -> _Value:
        return _Value(_group(record), _heading(record), label, quantity, batch, reading)

    spec = record.spec
    label = f"{short_label(record)} ({spec.engine.mode})" if spec.stack else None
    if "throughput" in spec.protocol.passes:
        for batch in spec.workload.batch_sizes:
            yield value("decode speed", batch, decode_at(batch).value(record))
    if "energy" in spec.protocol.passes:
        for quantity, name in ENERGY.items():
            yield value(quantity, main_batch(record), METRICS[name].value(record))


def _group(record: Record) -> str:
    """What rows that are held against each other share: all but stack, mode and batch size."""
    spec = record.spec
    workload = {**spec.workload.model_dump(mode="json"), "batch_sizes": [1]}
    bare = spec.replace(stack=(), engine={"name": spec.engine.name}, workload=workload)
    model, device = record.model, record.device
    return repr((bare.digest(), model and (model.revision, model.dtype), device and device.name))


def _heading(record: Record) -> str:
    workload, model, device = record.spec.workload, record.model, record.device
    # The part of a row (a made-up acceptance) stands in its label.
    made_up = ["synthetic weights"] if model is not None and model.baseline == "random" else []
    parts = [
        clean(record.spec.model.name),
        *made_up,
        model.dtype if model else "unknown type",
        clean(device.name) if device else "unknown device",
        f"{workload.prompt_tokens} prompt + {workload.new_tokens} new tokens",
    ]
    return ", ".join(parts)


def _ratio(value: _Value, dense: Sequence[_Value]) -> float | None:
    """How many times better than the best dense row of the same provenance; None without numbers."""
    own = value.reading
    if own.kind != "measured" or own.value <= 0:
        return None
    like = [
        one.reading.value
        for one in dense
        if one.reading.kind == "measured" and provenance(one.reading) == provenance(own)
    ]
    if not like:
        return None
    return own.value / max(like) if value.quantity == "decode speed" else min(like) / own.value


def render(crossings: Sequence[Crossing]) -> str:
    """Markdown: a table for each model and workload, a line for each row and quantity."""
    parts = []
    for heading in dict.fromkeys(one.heading for one in crossings):
        mine = [one for one in crossings if one.heading == heading]
        batches = sorted({point.batch for one in mine for point in one.points})
        lines = [
            f"**Times better than the best dense row: {heading}**",
            "",
            f"| run | of | {' | '.join(f'batch {size}' for size in batches)} | |",
            f"|---|---|{'--:|' * len(batches)}---|",
        ]
        for one in mine:
            found = dict(one.points)
            cells = [f"{found[size]:.2f}" if size in found else "–" for size in batches]
            lines.append(f"| {one.label} | {one.quantity} | {' | '.join(cells)} | {one.words()} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else ""
