"""Quality against bytes of the weights, and against the measured decode rate, on one quality axis.

Teacher, students, quantised teacher and quantised students have a marker each. The vertical axis is the
KL from the teacher with its standard error; the teacher's own is zero, which a logarithmic axis cannot
show, so it is a line at its bytes and at its rate. The dashed line of each panel is the Pareto front:
nothing else is better in both. Rows without a KL (another tokenizer) or a rate (simulated) are named.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.errors import UsageError
from compresskit.report.plot import canvas
from compresskit.report.plot.labels import annotate
from compresskit.report.students import BANDS, TEACHER, by_students, points

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compresskit.report.students import Point
    from compresskit.report.table import Group, Row, Table

_MARKS = dict(zip(BANDS, "*^oDs", strict=True))
_COLOURS = dict(zip(BANDS, ("black", *canvas.COLOURS[:4]), strict=True))


class View(NamedTuple):
    """One panel: what stands on its horizontal axis."""

    key: str
    label: str
    sign: float
    """-1 where more is better."""
    scale: float
    """From the number in the table to the one on the axis."""


VIEWS = (
    View("weights_bytes", "bytes of all weights held (MB)", 1.0, 1e-6),
    View("decode_tokens_per_s", "decoded tokens per second, as measured", -1.0, 1.0),
)


def shown(group: Group, view: View) -> list[Point]:
    """Rows with a place in the panel: not the teacher, nor what rounding put at a KL of 0."""
    ranked = points(group.rows, view.key, sign=view.sign)
    return [point for point in ranked if not point.row.dense and point.loss > 0]


def draw(table: Table, path: Path) -> None:
    """Draw `table` to `path`.

    Raises:
        UsageError: no student has bytes and a KL from its teacher, or the picture cannot be made.
    """
    canvas.check(path)
    groups = [
        group
        for group in by_students(table).groups
        if any("distill" in point.row.families for point in shown(group, VIEWS[0]))
    ]
    if not groups:
        raise UsageError(
            "no student has both bytes and a KL from its teacher, so there is nothing to plot. Run "
            "distill/student beside its teacher with the passes memory and quality."
        )
    figure, panels = canvas.new(
        width=13, height=6 * len(groups), rows=len(groups), columns=len(VIEWS)
    )
    places = [(group, view) for group in groups for view in VIEWS]
    for axes, (group, view) in zip(panels, places, strict=True):
        _panel(axes, group, view)
    # Names need the final place of the axes.
    figure.draw_without_rendering()
    for axes, (group, view) in zip(panels, places, strict=True):
        found = shown(group, view)
        annotate(axes, [_at(point, view) for point in found], [_name(p.row) for p in found])
    canvas.write(figure, path)


def _panel(axes: Any, group: Group, view: View) -> None:
    found = shown(group, view)
    for band in BANDS[1:]:
        members = [point for point in found if point.row.band == band]
        if members:
            _markers(axes, members, view, band)
    _front(axes, group, view, found)
    for row in group.rows:
        value = row.cells[view.key].value
        if row.band == TEACHER and value is not None and row.validity.verdict != "INVALID":
            axes.axvline(
                value * view.scale, color="black", linewidth=0.9, linestyle=_line(row.mode),
                label=f"{TEACHER} ({row.mode}): KL 0",
            )  # fmt: skip
    for row in group.rows:
        if not row.dense and all(point.row is not row for point in found):
            axes.plot([], [], " ", label=f"not shown: {_name(row)}")
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.margins(x=0.14, y=0.12)
    axes.set_xlabel(view.label)
    if view is VIEWS[0]:
        axes.set_ylabel("KL from the teacher ± SE (nats per token)")
        # Once for both panels: it may run on over the second one.
        axes.set_title(group.heading(), fontsize=8, loc="left")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, loc="best", framealpha=0.9)


def _markers(axes: Any, members: Sequence[Point], view: View, band: str) -> None:
    at = [_at(point, view) for point in members]
    axes.errorbar(
        [x for x, _ in at],
        [y for _, y in at],
        # A logarithmic axis ends above 0, whatever the error.
        yerr=[
            [min(_error(point.row), 0.99 * point.loss) for point in members],
            [_error(point.row) for point in members],
        ],
        fmt=_MARKS[band],
        color=_COLOURS[band],
        markersize=7,
        linewidth=0.9,
        label=band,
    )


def _front(axes: Any, group: Group, view: View, found: Sequence[Point]) -> None:
    """Join what nothing beats, the teacher included, in the order of the axis."""
    everybody = points(group.rows, view.key, sign=view.sign)
    best = sorted(_at(point, view) for point in found if not point.beaten(everybody))
    axes.plot(
        [x for x, _ in best],
        [y for _, y in best],
        color="#555555",
        linewidth=1,
        linestyle="--",
        zorder=0,
        label="Pareto front",
    )


def _at(point: Point, view: View) -> tuple[float, float]:
    return point.cost * view.sign * view.scale, point.loss


def _error(row: Row) -> float:
    return row.cells["kl_mean_nats"].stderr or 0.0


_STUDENT = re.compile(r"distill/student(?::path=(.*?))?(?=,revision=| \+ | #| \(|$)")


def _name(row: Row) -> str:
    """The label without families; of a student's folder its last part.

    >>> class Of:
    ...     def __init__(self, label): self.name = lambda: label
    >>> _name(Of("distill/student:path=/home/me/small + quant/int8 (compiled)"))
    'small + int8 (compiled)'
    >>> _name(Of("distill/student"))
    'student'
    """

    def short(found: re.Match[str]) -> str:
        return (found.group(1) or "student").rstrip("/").rpartition("/")[2]

    return _STUDENT.sub(short, row.name()).replace("quant/", "")


def _line(mode: str) -> str:
    return {"eager": "-", "prepacked": "-.", "compiled": ":"}.get(mode, "-")
