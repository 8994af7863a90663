"""What rounding each part of a model costs, and the widths that follow: for people and programs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from compresskit.units import significant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import JsonValue
    from rich.console import Console

FORMAT = "compresskit.sensitivity/1"


def document(
    model: str, revision: str, params: Mapping[str, JsonValue], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """JSON-ready: `params` of `quant/mixed`, and the `facts` that it left."""
    keys = ("granularity", "choices", "group", "symmetric", "zero_point", "precision", "text")
    found = {
        "format": FORMAT,
        "model": model,
        "revision": revision,
        **{key: params[key] for key in keys},
        "tokens": facts["mixed_sensitivity_tokens"],
        "budget_bits": facts["mixed_budget_bits"],
        "reached_bits": facts["mixed_reached_bits"],
        "predicted_kl_nats": facts["mixed_predicted_kl_nats"],
        "measured_kl_nats": facts["mixed_measured_kl_nats"],
        "parts": facts["mixed_sensitivity"],
    }
    return {**found, "variant": suite_variant(facts["mixed_as_intn"])}


def suite_variant(params: Mapping[str, Any]) -> str:
    """A variant for a suite file that packs the same widths without measuring again."""
    layers = "".join(f"  {json.dumps(layer)},\n" for layer in params["layers"])
    # TOML 1.0 allows line breaks inside the brackets of an array, also in an inline table.
    rest = [
        f"{key} = {json.dumps(value)}" for key, value in sorted(params.items()) if key != "layers"
    ]
    listed = [f"layers = [\n{layers}]"] if layers else []
    inside = ", ".join(['name = "quant/intn"', *rest, *listed])
    return f"[[variant]]\nstack = [{{ {inside} }}]\n"


def short(names: Sequence[str]) -> tuple[list[str], str]:
    """Names without what they have in common before their first number, and that.

    >>> short(["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"])
    (['0.mlp', '1.mlp', 'lm_head'], 'model.layers.')
    """
    heads = {match[0] for name in names if (match := re.match(r"\D*\.(?=[\d*])", name))}
    stem = heads.pop() if len(heads) == 1 else ""
    return [name.removeprefix(stem) for name in names], stem


def render(found: Mapping[str, Any], console: Console) -> None:
    """Print parts down and widths across; the chosen one is bracketed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names, stem = short([part["part"] for part in found["parts"]])
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    grid.add_column(f"KL (nats) by width\n{stem}*" if stem else "KL (nats) by width", no_wrap=True)
    for bits in found["choices"]:
        grid.add_column(f"{bits} bits", justify="right", no_wrap=True)
    for name, part in zip(names, found["parts"], strict=True):
        cells = [
            Text(f"[{significant(kl)}]" if int(bits) == part["bits"] else f"{significant(kl)} ")
            for bits, kl in part["kl_nats"].items()
        ]
        grid.add_row(Text(name), *cells)
    # Rather a line that runs over the edge than a number that is cut.
    grid.width = console.measure(grid, options=console.options.update(width=10_000)).maximum
    console.print(grid, crop=False)
    console.print()
    for line in lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def lines(found: Mapping[str, Any]) -> list[str]:
    """What is under the table."""
    return [
        "In brackets: the width that was chosen.",
        f"{found['model']}: {found['reached_bits']:.3f} bits per quantised weight of "
        f"{found['budget_bits']:g} allowed, scales included.",
        f"KL on {found['tokens']} tokens of {found['text']!r}: "
        f"{significant(found['predicted_kl_nats'])} nats predicted (sum of the chosen ones), "
        f"{significant(found['measured_kl_nats'])} measured with all parts packed.",
    ]
