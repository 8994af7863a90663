"""KL against effective bits: which scheme is closest to the dense model for the bytes it takes.

One panel per group of comparable rows, one marker per row. The line is the Pareto front: no other
row has both fewer bits and a smaller KL. Dense rows are the reference; their KL is zero, which a
logarithmic axis cannot show, so the legend names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.errors import UsageError
from compresskit.report.bits import bits_of, on_grid
from compresskit.report.plot import canvas
from compresskit.report.plot.labels import annotate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compresskit.report.table import Group, Row, Table


class Point(NamedTuple):
    """One row in the picture."""

    bits: float
    kl: float
    name: str
    hollow: bool
    """Simulated: the quality is real, the speed is not shown anywhere."""
    unranked: bool = False
    """The dense model lay on this very grid: its KL says nothing of full-precision weights."""


def points(group: Group) -> list[Point]:
    """Rows of a group that have both numbers and may be used; dense ones are not among them."""
    found = []
    for row in group.rows:
        bits, kl = bits_of(row), row.cells["kl_mean_nats"].value
        if bits is None or kl is None or kl <= 0 or row.dense or row.validity.verdict == "INVALID":
            continue
        simulated = any(cell.kind == "simulated" for cell in row.cells.values())
        found.append(Point(bits, kl, row.name(), simulated, on_grid(row)))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """The Pareto front, from few bits to many: each has a smaller KL than all with fewer bits.

    Unranked points are passed over.

    >>> a, b, c = (Point(bits, kl, "", False) for bits, kl in ((4, 0.2), (5, 0.3), (8, 0.01)))
    >>> front([c, b, a]) == [a, c]
    True
    """
    best: list[Point] = []
    ranked = [point for point in found if not point.unranked]
    for point in sorted(ranked, key=lambda one: (one.bits, one.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def draw(table: Table, path: Path) -> None:
    """Draw `table` to `path`.

    Raises:
        UsageError: no row has both bits and a KL, or the picture cannot be made.
    """
    canvas.check(path)
    groups = [group for group in table.groups if points(group)]
    if not groups:
        raise UsageError(
            "no row has both effective bits and a KL from the dense model, so there is nothing to "
            "plot. Run with the passes memory and quality."
        )
    figure, panels = canvas.new(width=9, height=5.6 * len(groups), rows=len(groups))
    for axes, group in zip(panels, groups, strict=True):
        _panel(axes, group)
    # Names need the final place of the axes.
    figure.draw_without_rendering()
    for axes, group in zip(panels, groups, strict=True):
        shown = points(group)
        annotate(axes, [(p.bits, p.kl) for p in shown], _names(shown))
    canvas.write(figure, path)


def _panel(axes: Any, group: Group) -> None:
    shown = points(group)
    families = list(dict.fromkeys(_family(point) for point in shown))
    for point in shown:
        colour = canvas.COLOURS[families.index(_family(point)) % len(canvas.COLOURS)]
        face = "none" if point.hollow else colour
        shape = "X" if point.unranked else "o"
        axes.plot(point.bits, point.kl, shape, markersize=6, color=colour, markerfacecolor=face)
    best = front(shown)
    axes.plot(
        [p.bits for p in best],
        [p.kl for p in best],
        color="#555555",
        linewidth=1,
        linestyle="--",
        zorder=0,
        label="Pareto front",
    )
    for bits in sorted({round(b, 2) for row in group.rows if (b := _dense_bits(row)) is not None}):
        # Usually far to the right, where a line would squeeze everything else.
        axes.plot([], [], " ", label=f"dense: {bits:g} bits, KL 0")
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("effective bits per parameter (all weights held, embeddings and head included)")
    axes.set_ylabel("KL from the dense model (nats per token)")
    axes.set_title(group.heading(), fontsize=8, wrap=True)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if any(point.hollow for point in shown):
        axes.plot([], [], "o", color="#555555", markerfacecolor="none", label="simulated")
    if any(point.unranked for point in shown):
        axes.plot([], [], "X", color="#555555", label="baseline on this very grid: not ranked")
    axes.legend(fontsize=7.5, loc="best", framealpha=0.9)


def _names(shown: Sequence[Point]) -> list[str]:
    """Names without the family, where all share it."""
    families = {point.name.partition("/")[0] for point in shown}
    stem = f"{families.pop()}/" if len(families) == 1 else ""
    return [point.name.removeprefix(stem) for point in shown]


def _dense_bits(row: Row) -> float | None:
    return bits_of(row) if row.dense and row.validity.verdict != "INVALID" else None


def _family(point: Point) -> str:
    """What shares a colour: the method, its parameters aside."""
    return point.name.partition(":")[0].partition(" ")[0]
