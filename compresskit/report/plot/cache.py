"""Loss against bytes of the cache: which method forgets least for what it holds.

One panel per way of looking, per group of comparable rows: recall lost in the long-context tasks, with
the question in view of the compression and without, and KL from the model's own full cache. Bytes are
those held, all metadata included, as a share of what the full cache takes at the same tokens; a method
that holds everything and reads little stands at 100 %. Bars are 95 % intervals over prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.errors import UsageError
from compresskit.report.plot import canvas
from compresskit.report.plot.labels import annotate

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.report.table import Group, Row, Table


class View(NamedTuple):
    """One way of looking at the loss."""

    key: str
    label: str
    scale: str
    sign: float
    """What turns the cell into a loss: larger is worse."""


VIEWS = (
    View("task_delta_aware", "recall lost, question in view (points)", "linear", -100.0),
    View("task_delta_agnostic", "recall lost, question unknown (points)", "linear", -100.0),
    View("kl_mean_nats", "KL from the full cache (nats per token)", "log", 1.0),
)
CONTROL = "kv/random"
"""Drawn hollow and joined by a line: what is not below it at equal bytes is worth nothing."""


class Point(NamedTuple):
    """One row in one panel."""

    share: float
    """Bytes held, in percent of the full cache's."""
    loss: float
    low: float
    high: float
    name: str

    @property
    def family(self) -> str:
        """What shares a colour: the method, its parameters aside."""
        return self.name.partition(":")[0].partition(" ")[0]


def points(group: Group, view: View) -> list[Point]:
    """Rows of a group that changed the cache and have both numbers."""
    found = []
    for row in group.rows:
        loss, ratio = row.cells.get(view.key), row.cells["cache_achieved_ratio"].value
        if row.dense or row.validity.verdict == "INVALID" or loss is None or loss.value is None:
            continue
        if not ratio or (view.scale == "log" and loss.value <= 0):
            continue
        value = loss.value * view.sign
        ends = [value] if loss.low is None or loss.high is None else _signed(row, view)
        found.append(Point(100 / ratio, value, min(ends), max(ends), row.name()))
    return found


def _signed(row: Row, view: View) -> list[float]:
    cell = row.cells[view.key]
    return [end * view.sign for end in (cell.low, cell.high) if end is not None]


def draw(table: Table, path: Path) -> None:
    """Draw `table` to `path`.

    Raises:
        UsageError: no row has both the bytes of its cache and a loss, or the picture cannot be made.
    """
    canvas.check(path)
    shown = [
        (group, view, found)
        for group in table.groups
        for view in VIEWS
        if len(found := points(group, view)) > 1
    ]
    if not shown:
        raise UsageError(
            "no two rows have both the bytes of their cache and a loss, so there is nothing to plot. "
            "Run cache methods with the passes memory and quality."
        )
    figure, panels = canvas.new(width=9, height=5.2 * len(shown), rows=len(shown))
    for axes, (group, view, found) in zip(panels, shown, strict=True):
        _panel(axes, group, view, found)
    # Names need the final place of the axes.
    figure.draw_without_rendering()
    for axes, (_, _, found) in zip(panels, shown, strict=True):
        names = [point.name.removeprefix("kv/") for point in found]
        annotate(axes, [(point.share, point.loss) for point in found], names)
    canvas.write(figure, path)


def _panel(axes: Any, group: Group, view: View, found: list[Point]) -> None:
    families = list(dict.fromkeys(point.family for point in found))
    for point in found:
        colour = canvas.COLOURS[families.index(point.family) % len(canvas.COLOURS)]
        control = point.family == CONTROL
        axes.errorbar(
            [point.share],
            [point.loss],
            yerr=[[point.loss - point.low], [point.high - point.loss]],
            fmt="o",
            markersize=6,
            color="#555555" if control else colour,
            markerfacecolor="none" if control else colour,
            linewidth=0.8,
        )
    control_line = sorted(point[:2] for point in found if point.family == CONTROL)
    if control_line:
        axes.plot(
            [share for share, _ in control_line],
            [loss for _, loss in control_line],
            color="#555555",
            linewidth=1,
            linestyle="--",
            zorder=0,
            label="rows dropped by lot (control)",
        )
        axes.legend(fontsize=7.5, loc="best", framealpha=0.9)
    axes.set_yscale(view.scale)
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("bytes held, % of the full cache at the same tokens (all metadata included)")
    axes.set_ylabel(view.label)
    axes.set_title(group.heading(), fontsize=8, wrap=True)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
