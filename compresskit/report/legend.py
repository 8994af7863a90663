"""What every table says about itself, in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.money import pue
from compresskit.report import speculation, students, tasks
from compresskit.report.cells import MARKS, UNPAIRED
from compresskit.report.labels import clean
from compresskit.stats import ALPHA

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from compresskit.report.cells import Cell, Comparison
    from compresskit.report.table import Table
    from compresskit.spec import Prices

_MEANING = {
    "better": "better",
    "worse": "worse",
    "same": "the same, the whole interval is within that factor",
    "inconclusive": "inconclusive, too few or too noisy samples",
}


def lines(table: Table) -> list[str]:
    """Explain only what occurs in `table`."""
    cells = [
        row.cells[key]
        for group in table.groups
        for row in group.rows
        for key in sorted(group.shown)
    ]
    legend = _ratios([cell.comparison for cell in cells if cell.comparison is not None])
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
    legend += _energy(
        row.cells["j_per_output_token"]
        for group in table.groups
        if "j_per_output_token" in group.shown
        for row in group.rows
    )
    legend += _cache(table)
    legend += [speculation.LEGEND] if "predicted_ratio_to_baseline" in _shown(table) else []
    legend += [students.LEGEND] if students.PARETO in _shown(table) else []
    legend += [tasks.LEGEND] if any(group.section("tasks") for group in table.groups) else []
    legend += _limits_and_money(table)
    legend += _kinds(cells)
    return legend


def _ratios(found: list[Comparison]) -> list[str]:
    """How ratios came about, and the marks behind them."""
    said = []
    verdicts = {one.verdict for one in found}
    factors = sorted({one.factor for one in found if one.factor is not None})
    if factors:
        marks = "; ".join(
            f"{mark} {_MEANING[word]}" for word, mark in MARKS.items() if word in verdicts
        )
        said.append(
            "×: ratio of decode rates of runs that took turns, the median over the rounds [95 % "
            f"bootstrap interval]. A difference is one beyond the factor {factors[0]:g} with "
            f"p < {ALPHA:g} in an exact test. {marks}."
        )
    if None in verdicts:
        said.append(
            f"{UNPAIRED}: not measured side by side: drift of the machine is in this number, so it "
            "has neither an interval nor a verdict."
        )
    return said


def _energy(cells: Iterable[Cell]) -> Iterator[str]:
    """What measured energies cover and where they come from."""
    measured = [cell for cell in cells if cell.kind == "measured"]
    told = dict.fromkeys(
        cell.provenance.replace("_", " ") + (f", {cell.scope} only" if cell.scope else "")
        for cell in measured
    )
    if told:
        error = " ± standard error over windows" if any(cell.stderr for cell in measured) else ""
        yield f"energy/token: gross joules{error}, prefill included ({' | '.join(told)})."


def _cache(table: Table) -> Iterator[str]:
    """The three sizes of a cache, apart."""
    if {"cache_nominal_ratio", "cache_achieved_ratio"} & _shown(table):
        yield (
            "cache ÷ asked: how many times smaller the parameters would make it, without scales and "
            "indices. cache ÷ held: the model's own cache at the same tokens over what is really "
            "held, all metadata included (– in both: it is the model's own). cache/token is what is "
            "held; peak memory is that of the whole process."
        )


def _shown(table: Table) -> set[str]:
    return {key for group in table.groups for key in group.shown}


def _limits_and_money(table: Table) -> Iterator[str]:
    shown = _shown(table)
    if "roofline_fraction" in shown:
        yield (
            "of memory limit: bytes that a decode step has to read, over measured copy bandwidth "
            "and measured time; above 100 % they come from a cache. bound by: the largest of the "
            "modelled times of memory, compute and launches, which may leave much of a step open."
        )
    prices = [row.prices for group in table.groups for row in group.rows if row.prices is not None]
    energy = bool(
        {"electricity_per_million_output_tokens", "gco2e_per_million_output_tokens"} & shown
    )
    if energy or "rent_per_million_output_tokens" in shown:
        told = dict.fromkeys(_told(one) for one in prices)
        yield (
            f"Prices as given: {' | '.join(told)}. Per million output tokens, prefill included; "
            "rent and electricity are never added."
        )
    if energy:
        factors = dict.fromkeys(pue(one)[1] for one in prices)
        yield (
            f"Electricity and CO2e: gross energy of what the counter covers ({', '.join(factors)})."
        )
    if any("break_even" in key for key in shown):
        yield (
            "break-even: output tokens after which the time (energy) saved makes up for that of "
            "compressing."
        )


def _told(prices: Prices) -> str:
    """Prices in words."""
    currency = clean(prices.currency)
    parts = [
        f"{prices.per_hour:g} {currency} per hour" if prices.per_hour is not None else "",
        f"{prices.per_kwh:g} {currency} per kWh" if prices.per_kwh is not None else "",
        f"{prices.grams_co2_per_kwh:g} g CO2e per kWh"
        if prices.grams_co2_per_kwh is not None
        else "",
    ]
    source = f" ({clean(prices.source)})" if prices.source else ""
    return ", ".join(part for part in parts if part) + source


def _kinds(cells: list[Cell]) -> Iterator[str]:
    kinds = {cell.kind for cell in cells}
    if "estimated" in kinds:
        yield "~: estimated by a model, not measured; never ranked with measured numbers."
    if "invalid" in kinds:
        yield "invalid: these numbers were taken, but mean nothing; the footnote says why."
    if "simulated" in kinds:
        yield "simulated: the quality is real, the saving is not; no speed is shown."
