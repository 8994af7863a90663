"""A losslessness audit on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from compresskit.audit.document import Audit, SampledCheck


def render(found: Audit, console: Console) -> None:
    """Print what was looked at, what came out, and the verdict with its reasons."""
    from rich.table import Table

    sampling, asked = found.asked.sampling, found.asked
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    filters = {"top-k": sampling.top_k, "min-p": sampling.min_p}
    how += "".join(f", {name} {value:g}" for name, value in filters.items() if value)
    how += f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    table = Table(
        title=f"{found.label} on {found.model} ({found.dtype}, {how}, batch {asked.batch})",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for column in ("check", "looked at", "found"):
        table.add_column(column)
    for row in _rows(found):
        table.add_row(*row)
    console.print(table)
    for note in found.notes:
        console.print(f"not checked: {note}", markup=False, highlight=False)
    console.print(f"\n{found.verdict}", style="bold", markup=False, highlight=False)
    for reason in found.reasons:
        console.print(f"  {reason}", markup=False, highlight=False)


def _rows(found: Audit) -> Iterator[tuple[str, str, str]]:
    asked = found.asked
    if (rule := found.rule) is not None:
        worst = max(rule.identity_error, rule.chain_error, rule.tree_error)
        yield (
            "rule",
            f"{rule.pairs} pairs of p and q, {rule.texts} enumerated texts",
            f"largest error {worst:.1e} (at most {rule.bound:g})",
        )
    if (greedy := found.greedy) is not None:
        yield (
            "greedy",
            f"{greedy.prompts} answers of {greedy.new_tokens} tokens{_drafts(greedy.drafted, greedy.accepted)}",
            f"{greedy.equal} equal plain decoding's",
        )
    if (stops := found.stops) is not None:
        inside = "" if stops.inside is None else f", {stops.inside} ended in a step with a draft"
        yield (
            "stops",
            f"{stops.answers} answers{inside}",
            "all end in the right place" if not stops.wrong else "not all end in the right place",
        )
    if found.sampled is not None:
        yield _sampled("sampled", found.sampled, asked.depth)
    if found.again is not None:
        yield _sampled("again", found.again, asked.depth)


def _sampled(name: str, test: SampledCheck, depth: int) -> tuple[str, str, str]:
    p = "no p" if test.p is None else f"p {test.p:.2g}"
    seen = "nothing" if test.detectable is None else f"a divergence of {test.detectable:.3g}"
    impossible = f", {test.impossible} impossible" if test.impossible else ""
    return (
        name,
        f"{test.draws} draws, first {depth} tokens, {test.cells} cells"
        f"{_drafts(test.drafted, test.accepted)}",
        f"chi-square {test.chi_square:.1f} on {test.degrees}, {p}, total variation "
        f"{test.total_variation:.3f} (noise {test.noise:.3f}){impossible}; can see {seen}",
    )


def _drafts(drafted: int | None, accepted: int | None) -> str:
    return "" if drafted is None else f", {accepted} of {drafted} drafted tokens accepted"
