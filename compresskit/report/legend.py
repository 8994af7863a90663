"""What every table says about itself, in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compresskit.report.table import Table


def lines(table: Table) -> list[str]:
    """Explain only what occurs in `table`."""
    cells = [cell for group in table.groups for row in group.rows for cell in row.cells.values()]
    legend: list[str] = []
    if any(cell.low is not None for cell in cells):
        legend.append(
            "×: ratio of median decode rates, [95 % bootstrap interval] over the repetitions of "
            "both runs; not paired, so drift of the machine between the runs is not in it."
        )
    if any(cell.kind == "reference" for cell in cells):
        legend.append(
            "–: nothing to say for this row (it is the reference, or does not speculate)."
        )
    if any(group.context["baseline"] == "dequantized gguf" for group in table.groups):
        legend.append(
            "dequantized gguf: the baseline is a quantised file unpacked to floats, not the original "
            "weights; deltas are from that copy, and rounding it a second time costs more than "
            "rounding the original once (or nothing, on the very grid of the file)."
        )
    if any(cell.kind == "estimated" for cell in cells):
        legend.append("~: estimated by a model, not measured; never ranked with measured numbers.")
    if any(cell.kind == "invalid" for cell in cells):
        legend.append("invalid: these numbers were taken, but mean nothing; the footnote says why.")
    if any(cell.kind == "simulated" for cell in cells):
        legend.append("simulated: the quality is real, the saving is not; no speed is shown.")
    return legend
