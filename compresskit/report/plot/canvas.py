"""The library, the figure and the file: what every picture shares.

matplotlib is imported when something is drawn, never before. Pictures are made without a display
and without a date, so the same numbers give the same file.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from compresskit.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = ("svg", "png", "pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Okabe and Ito's palette, which stays apart for colour-blind eyes."""


def check(path: Path) -> None:
    """Find out early whether `path` can be drawn.

    Raises:
        UsageError: matplotlib is missing, or the ending names no format.
    """
    if path.suffix[1:].lower() not in FORMATS:
        raise UsageError(
            f"{path}: a picture ends in {', '.join('.' + one for one in FORMATS[:-1])} "
            f"or .{FORMATS[-1]}."
        )
    figure_class()


def figure_class() -> Any:
    """The `Figure` of matplotlib, which needs no display and no global state.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "drawing needs matplotlib, which is not installed. Install it with: "
            "pip install matplotlib"
        ) from None
    return Figure


def new(*, width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of `width` by `height` inches with `rows` by `columns` panels, row by row.

    Panels beside each other share their vertical axis.
    """
    figure = figure_class()(figsize=(width, height), layout="constrained")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # measures text without a display
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey="row").flat)


def write(figure: Any, path: Path) -> None:
    """Write `figure` in the format that the ending of `path` names.

    Raises:
        UsageError: the file cannot be written.
    """
    import matplotlib as mpl

    kind = path.suffix[1:].lower()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    out = io.BytesIO()
    # A salt instead of a random number in the names of the drawing's elements.
    with mpl.rc_context({"svg.hashsalt": "compresskit"}):
        figure.savefig(out, format=kind, dpi=150, metadata=undated)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}.") from None
