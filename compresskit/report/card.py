"""The model card of an exported checkpoint: what was done, what it costs, how to load it.

Every number is measured and says where, or is said to be missing together with the command that
would measure it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from compresskit.metrics import METRICS
from compresskit.record import Measured
from compresskit.report import derived
from compresskit.report.cells import of_reading, text
from compresskit.report.labels import clean
from compresskit.units import Unit, format_quantity, significant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compresskit.record import Fidelity, Quality, Record
    from compresskit.report.cells import Cell
    from compresskit.report.join import Joined, Row
    from compresskit.spec import RunSpec

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Line(NamedTuple):
    """One measured line of the card."""

    name: str
    value: str


@dataclass(frozen=True)
class Card:
    """What a card is made of."""

    name: str
    """Of the folder."""
    spec: RunSpec
    revision: str
    kind: str
    """Where the base model came from: hub, local, gguf, pypi or tiny."""
    licence: str
    """What is known of the base model's licence; empty if nothing is."""
    dtype: str
    forms: Mapping[str, int]
    """Layers by form."""
    dense: Sequence[str]
    """Linear layers that stayed dense."""
    untied: bool
    tensor_bytes: int
    base_bytes: int
    parameters: int
    calibration_tokens: int
    calibration_seconds: float
    vllm: str
    zero_points: bool
    mixed: bool
    version: str
    """Of compresskit."""
    row: Row | None = None
    """The record of this very stack, joined with its baseline."""
    quality: Quality | None = None
    """Measured while exporting, on the exported weights."""


def of_stack(joined: Joined, spec: RunSpec, revision: str) -> Row | None:
    """The newest sound record of the stack of `spec` on the same model; measured with any workload."""
    found = [
        row
        for row in joined.rows
        if row.record.status == "ok"
        and row.validity.verdict != "INVALID"
        and row.record.spec.stack == spec.stack
        and row.record.spec.model.dtype == spec.model.dtype
        and row.record.model is not None
        and row.record.model.revision == revision
    ]
    return max(found, key=lambda row: row.record.started_at, default=None)


def render(card: Card) -> str:
    """The card as Markdown."""
    parts = [
        _front(card), f"# {clean(card.name)}", _what(card), "## Size", _size(card),
        "## Measured", _measured(card), "## Load it", _load(card),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _front(card: Card) -> str:
    entries: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if card.kind == "hub" and _HUB_NAME.fullmatch(card.spec.model.name):
        entries["base_model"] = card.spec.model.name
        entries["base_model_relation"] = "quantized"
    entries["tags"] = ["compressed-tensors", "compresskit"]
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


def _what(card: Card) -> str:
    base = f"`{clean(card.spec.model.name)}`, revision `{clean(card.revision)}`, {card.dtype}"
    lines = [
        f"A quantised copy of {base}, made by compresskit {card.version} and stored as "
        "compressed-tensors.",
        "",
        f"* Licence of the base model: {clean(card.licence) or 'not known here; see its own card'}",
        *(f"* Method: `{method.label()}`" for method in card.spec.stack),
        *(f"* {count} layers: {name}" for name, count in card.forms.items()),
        f"* Linear layers left dense: {_named(card.dense)}",
        f"* Calibration: {_calibration(card)}",
        f"* Seed: {card.spec.seed}",
    ]
    if card.untied:
        lines.append(
            "* The output head shared the embedding's weight; here it has a packed one of its own "
            "beside the dense embedding"
        )
    return "\n".join(lines)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return shown + more if names else "none"


def _calibration(card: Card) -> str:
    if not card.calibration_tokens:
        return "none"
    return f"{card.calibration_tokens} tokens; compressing took {significant(card.calibration_seconds)} s"


def _size(card: Card) -> str:
    bits = 8 * card.tensor_bytes / card.parameters
    before = 8 * card.base_bytes / card.parameters
    return "\n".join(
        [
            "| | bytes | bits per parameter |",
            "| --- | ---: | ---: |",
            f"| base model ({card.dtype}) | {_bytes(card.base_bytes)} | {before:.2f} |",
            f"| this checkpoint | {_bytes(card.tensor_bytes)} | {bits:.2f} |",
            "",
            f"Tensors only, everything counted: scales, zero points, embedding, norms and head, over "
            f"{card.parameters:,} parameters.",
        ]
    )


def _bytes(count: int) -> str:
    return format_quantity(float(count), Unit.BYTE, 4)


def _measured(card: Card) -> str:
    sections = []
    if card.quality is not None:
        lines = _quality(card.quality.fidelity)
        sections.append(_table("On the exported weights, while exporting", lines))
        sections += [f"Note: {clean(note)}." for note in card.quality.notes]
    if card.row is not None:
        sections.append(_table(_where(card.row.record), _of_row(card.row)))
        if card.row.validity.reasons:
            sections.append(f"Reservations: {'; '.join(map(clean, card.row.validity.reasons))}.")
    if not sections:
        sections.append(f"Not measured. To measure it:\n\n```\n{_command(card.spec)}\n```")
    return "\n\n".join(sections)


def _command(spec: RunSpec) -> str:
    words = ["compresskit", "run", "--model", spec.model.name]
    if spec.model.dtype != "auto":
        words += ["--dtype", spec.model.dtype]
    for method in spec.stack:
        words += ["--method", method.label()]
    return shlex.join([*words, "--out", "results"])


def _where(record: Record) -> str:
    device, spec = record.device, record.spec
    machine = "an unknown machine" if device is None else clean(device.name)
    return (
        f"On {machine}, {spec.protocol.threads} thread(s), {spec.engine.mode} mode, "
        f"{spec.workload.prompt_tokens} + {spec.workload.new_tokens} tokens, record "
        f"`{record.digest}` of {clean(record.started_at)}"
    )


def _of_row(row: Row) -> list[Line]:
    rate = of_reading(METRICS["decode_tokens_per_s"].value(row.record))
    lines = _quality(row.record.quality.fidelity if row.record.quality else None)
    ratio = _against(derived.ratio(row.record, row.baseline))
    return [
        *lines,
        Line("decode rate (tok/s)", text(rate, "plain") if rate.value else f"n/a ({rate.reason})"),
        Line("decode rate against the dense model", ratio),
        *_weights(row.record),
    ]


def _against(ratio: Cell) -> str:
    """A ratio with its verdict in words."""
    if ratio.value is None:
        return f"n/a ({ratio.reason})"
    found = ratio.comparison
    if found is None or not found.paired:
        return f"{ratio.value:.2f}x (not measured side by side: no verdict)"
    reason = f": {found.reason}" if found.reason else ""
    return (
        f"{text(replace(ratio, comparison=None), 'ratio')}x, side by side ({found.verdict}{reason})"
    )


def _weights(record: Record) -> list[Line]:
    held = METRICS["weights_bytes"].value(record)
    if not isinstance(held, Measured):
        return []
    return [Line("weights in memory", format_quantity(held.value, held.unit))]


def _quality(near: Fidelity | None) -> list[Line]:
    if near is None:
        return [Line("distance from the dense model", "n/a (the quality pass was not run)")]
    spread = "" if near.kl.stderr is None else f" ± {significant(near.kl.stderr, 2)}"
    return [
        Line("KL from the dense model (nats per token)", significant(near.kl.mean) + spread),
        Line("same most likely token", f"{100 * near.top1_agreement:.2f} %"),
        Line("perplexity ratio", f"{math.exp(near.delta_nll):.4f}"),
        Line("protocol", f"`{near.protocol_id}`, {near.scored_tokens} tokens"),
    ]


def _table(title: str, lines: Sequence[Line]) -> str:
    rows = [f"| {line.name} | {line.value} |" for line in lines]
    return "\n".join([f"{title}:", "", "| | |", "| --- | --- |", *rows])


def _load(card: Card) -> str:
    extra = ""
    imports = "AutoModelForCausalLM, AutoTokenizer"
    if card.zero_points and not card.mixed:
        imports += ", CompressedTensorsConfig"
        extra = ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    folder = json.dumps(card.name)
    said = [
        "```python",
        f"from transformers import {imports}",
        f"model = AutoModelForCausalLM.from_pretrained({folder}{extra})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        "```",
        "",
        "transformers needs `pip install compressed-tensors` and unpacks the weights to run them"
        + _zero_points(card),
        "",
        f"{card.vllm}. Read from vLLM's source, not run: `vllm serve {card.name}`",
        "",
        f"compresskit runs the packed weights: `compresskit evaluate --model {card.name}`",
    ]
    return "\n".join(said)


def _zero_points(card: Card) -> str:
    if not card.zero_points:
        return "."
    said = (
        "; with zero points it (5.23, with compressed-tensors 0.20) can only do so at load, in the "
        "type of the scales."
    )
    if card.mixed:
        return (
            said
            + " There it takes one scheme for all layers, so that this checkpoint cannot be loaded."
        )
    return said
