"""Names beside points, kept apart as far as there is room.

Each name tries places around its point, near ones first, and takes the first that covers neither a
point nor a name that stands already; where none is free, the one that covers least. A name that had
to go far gets a thin line to its point.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_DISTANCES = (7.0, 16.0, 28.0, 44.0, 62.0)
_DIRECTIONS = tuple(math.radians(angle) for angle in (0, 45, 90, 315, 270, 135, 225, 180, 20, 340))
_FAR = 20.0
_POINT = 5.0
"""Half a marker and a little air, in points of a 72nd of an inch, as all lengths here."""


class Box(NamedTuple):
    """A rectangle on the canvas, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def outside(self, frame: Box) -> float:
        """Area of this box that the frame does not cover."""
        size = (self.right - self.left) * (self.top - self.bottom)
        return size - self.overlap(frame)


def annotate(axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write `names` beside `points` (data coordinates); the axes' limits must stand already."""
    renderer = axes.figure.canvas.get_renderer()
    pixel = axes.figure.dpi / 72
    at = [axes.transData.transform(point) for point in points]
    taken = [_around(x, y, _POINT * pixel) for x, y in at]
    extent = axes.get_window_extent(renderer)
    frame = Box(extent.x0, extent.y0, extent.x1, extent.y1)
    for point, (x, y), name in zip(points, at, names, strict=True):
        text = axes.annotate(
            name, point, textcoords="offset points", xytext=(0, 0), fontsize=7.5, va="center"
        )
        size = text.get_window_extent(renderer)
        width, height = 1.06 * size.width / pixel, size.height / pixel  # hinting differs by size
        places = [(d, a) for d in _DISTANCES for a in _DIRECTIONS]
        best = min(
            places,
            key=lambda place: _badness(
                _box(x, y, place, width, height, pixel), place[0], taken, frame
            ),
        )
        box = _box(x, y, best, width, height, pixel)
        taken.append(box)
        text.set_position(((box.left - x) / pixel, ((box.bottom + box.top) / 2 - y) / pixel))
        if best[0] > _FAR:
            near = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
            ends = axes.transData.inverted().transform([(x, y), near])
            axes.plot(ends[:, 0], ends[:, 1], color="#999999", linewidth=0.5, zorder=1)


def _badness(box: Box, distance: float, taken: Iterable[Box], frame: Box) -> tuple[float, float]:
    """Area covered that should not be, then the distance from the point."""
    return sum(box.overlap(other) for other in taken) + box.outside(frame), distance


def _around(x: float, y: float, half: float) -> Box:
    return Box(x - half, y - half, x + half, y + half)


def _box(
    x: float, y: float, place: tuple[float, float], width: float, height: float, pixel: float
) -> Box:
    """The text's box if its nearest edge or corner stands at `place` from (x, y)."""
    distance, angle = place
    dx, dy = math.cos(angle), math.sin(angle)
    left = x + pixel * (distance * dx + (dx - 1) / 2 * width)
    bottom = y + pixel * (distance * dy + (dy - 1) / 2 * height)
    return Box(left, bottom, left + pixel * width, bottom + pixel * height)
