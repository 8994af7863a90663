"""Decode time and bytes of the cache against its length, one line a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.report.plot import canvas

if TYPE_CHECKING:
    from pathlib import Path


SPREAD = 4
"""Longest over shortest step from which on a linear axis would hide the short ones."""


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a curve document (see `compresskit curve --json`) to `path`.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    canvas.check(path)
    figure, (times, sizes) = canvas.new(width=9, height=9, rows=2)
    lengths = [int(tokens) for tokens in found["lengths"]]
    for index, name in enumerate(found["rows"]):
        rows = [at[name] for at in found["lengths"].values()]
        look = {
            "color": "black" if name == "dense" else canvas.COLOURS[index % len(canvas.COLOURS)],
            "linestyle": "-" if index <= len(canvas.COLOURS) else "--",
            "marker": "o",
            "markersize": 3.5,
            "linewidth": 1,
            "label": name,
        }
        times.plot(lengths, [1000 * row["median_seconds"] for row in rows], **look)
        sizes.plot(lengths, [sum(row["cache_bytes"].values()) / 1e6 for row in rows], **look)
    times.set_ylabel("ms per decode step (median)")
    sizes.set_ylabel("bytes held by the cache (MB)")
    sizes.set_yscale("log")
    taken = [row["median_seconds"] for at in found["lengths"].values() for row in at.values()]
    if max(taken) > SPREAD * min(taken):
        times.set_yscale("log")
    for axes in (times, sizes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens in the cache")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    times.set_title(
        f"{found['model']}, {found['dtype']}, {found['device']}, {threads}, batch {found['batch']}; "
        "random keys and values",
        fontsize=9,
    )
    figure.legend(
        *times.get_legend_handles_labels(),
        fontsize=8, ncols=3, loc="outside lower center", frameon=False,
    )  # fmt: skip
    canvas.write(figure, path)
