"""KL of each part of a model at each width, with the widths that were chosen.

Parts stand from left to right in the order of the model, one coloured line per width. A ring marks
the width that the part was given: narrow rings low in the picture are parts that mind little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.report.plot import canvas
from compresskit.report.sensitivity import short

if TYPE_CHECKING:
    from pathlib import Path

_WIDEST = 24.0


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw a sensitivity document (see `compresskit sensitivity --json`) to `path`.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    canvas.check(path)
    parts = document["parts"]
    figure, (axes,) = canvas.new(width=min(_WIDEST, max(8.0, 2 + 0.19 * len(parts))), height=6)
    for index, bits in enumerate(document["choices"]):
        axes.plot(
            range(len(parts)),
            [_positive(part["kl_nats"][str(bits)]) for part in parts],
            marker="o",
            markersize=3.5,
            linewidth=1,
            color=canvas.COLOURS[index % len(canvas.COLOURS)],
            label=f"{bits} bits",
        )
    axes.plot(
        range(len(parts)),
        [_positive(part["kl_nats"][str(part["bits"])]) for part in parts],
        "o",
        markersize=9,
        color="black",
        markerfacecolor="none",
        label="chosen",
    )
    axes.set_yscale("log")
    axes.set_xlim(-0.8, len(parts) - 0.2)
    names, stem = short([part["part"] for part in parts])
    axes.set_xticks(range(len(parts)), names, rotation=90, fontsize=7)
    axes.set_xlabel(f"part of the model{f' ({stem}*)' if stem else ''}, alone rounded")
    axes.set_ylabel("KL from the dense model (nats per token)")
    axes.set_title(_title(document), fontsize=9)
    axes.grid(True, which="major", axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(
        fontsize=8, ncols=len(document["choices"]) + 1, loc="outside lower center", frameon=False
    )
    canvas.write(figure, path)


def _title(document: dict[str, Any]) -> str:
    return (
        f"{document['model']}: what rounding one part costs, and the widths chosen for "
        f"{document['budget_bits']:g} bits per quantised weight\n"
        f"{document['tokens']} tokens of the text {document['text']!r}; reached "
        f"{document['reached_bits']:.2f} bits; sum of the chosen KLs "
        f"{document['predicted_kl_nats']:.3g} nats"
    )


def _positive(kl: float) -> float:
    """A logarithmic axis has no place for 0 or for what rounding made negative."""
    return kl if kl > 0 else float("nan")
