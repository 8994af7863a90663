"""Widths layer by layer, chosen under a budget of bits from what rounding each of them costs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, final

import torch
from pydantic import AfterValidator, Field, JsonValue

from compresskit.methods.quant import _budget, _divergence, _overrides, _parts, _sensitivity
from compresskit.methods.quant._calibrate import AbstractCalibrated, rows
from compresskit.methods.quant._group import Activations, Bits, Group, ZeroPoint, scheme
from compresskit.methods.quant._linear import quantise_linears
from compresskit.methods.quant._parts import Granularity

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.methods.quant._linear import Scheme
    from compresskit.methods.quant._sensitivity import Table
    from compresskit.system import System


def _ascending(choices: tuple[Bits, ...]) -> tuple[Bits, ...]:
    if list(choices) != sorted(set(choices)):
        raise ValueError("list each width once, from narrow to wide")
    return choices


class Search(NamedTuple):
    """What was measured, and what follows from it."""

    table: Table
    choice: _budget.Choice
    widths: dict[str, int]
    """Name of each weight -> bits."""
    rows: torch.Tensor
    """The calibration text, int64 `[B, S]`."""
    calibration: dict[str, JsonValue]
    """What it is."""

    def patterns(self) -> dict[str, int]:
        """A pattern for the weights of each part -> bits."""
        return {
            _parts.pattern_of(entry.part, entry.members): self.choice.bits[entry.part]
            for entry in self.table.entries
        }


@final
class Mixed(AbstractCalibrated):
    """Give each part of the model its own width, so that the whole stays within a budget of bits.

    Every part is rounded alone to every width of `choices`, and the divergence of the next-token
    predictions from the dense ones is measured on calibration text. Then widths are chosen that
    keep the sum of those divergences small (a knapsack, see `_budget`), and the layers are packed
    at them. The facts hold the table, the widths, the bits reached, and the predicted and the
    measured divergence of the result. Rounding is that of `quant/intn`.

    Paper: Dong et al. 2019, HAWQ-V2, arXiv 1911.03852 (a knapsack over layer sensitivities).
    Differs: sensitivity is a measured KL divergence, not a Hessian trace; to nearest, per group.
    Cost: parts x choices forward passes over the calibration text, from the part's block on.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {
        "budget": 4.5, "choices": [2, 4, 8], "group": 32, "samples": 2, "length": 32,
    }  # fmt: skip

    budget: Annotated[float, Field(ge=2, le=16)] = 4.5
    """Bits per quantised weight, scales and offsets included; what stays dense is not counted."""
    choices: Annotated[tuple[Bits, ...], Field(min_length=1), AfterValidator(_ascending)] = (
        2, 3, 4, 6, 8,
    )  # fmt: skip
    """Widths to choose from, from narrow to wide."""
    granularity: Granularity = "part"
    """What gets one width: each layer; each part of a block (attention, MLP); each block; each kind
    of layer across the blocks. Fewer parts are measured in less time."""
    group: Group = 64
    """Weights that share a scale, along the input (0: a whole row); a last group may be ragged."""
    symmetric: bool = False
    """Levels around zero without an offset, instead of from minimum to maximum."""
    zero_point: ZeroPoint = "float"
    """Without symmetry: a float offset, or an integer zero point as checkpoints store it."""
    activations: Activations = "float"
    """What the weights are multiplied with: 16-bit floats, or int8 rounded per token and group;
    sensitivities are those of the weights alone."""
    # Short rows give the first tokens, whose activations are extreme, a weight that they do not have
    # in use. SmolLM2-135M at 4.5 bits, held-out KL: 0.268 nats with 4 rows of 64, which is what
    # 4 bits everywhere give; 0.245 with one row of 256.
    samples: Annotated[int, Field(ge=1)] = 1
    """Rows of calibration tokens; more take proportionally longer."""
    length: Annotated[int, Field(ge=2)] = 256
    """Tokens a row."""
    precision: Literal["float32", "model"] = "float32"
    """Type in which sensitivities are measured. Float32 holds four more bytes a parameter while it
    lasts; in a model's own 16 bits, noise hides what the wider choices cost."""

    def apply(self, system: System, ctx: Context) -> System:
        """Measure, choose, and replace the layers in place."""
        found = self.search(system, ctx)
        with torch.no_grad():
            kept = _divergence.batches(system, found.rows)[0]
            dense = _divergence.logits_of(system.model, kept)
        head = next(iter(found.widths.values()))
        schemes: dict[int, Scheme[Any]] = {
            bits: scheme(
                bits=bits,
                activations=self.activations,
                group=self.group,
                symmetric=self.symmetric,
                zero_point=self.zero_point,
            )
            for bits in self.choices
        }
        packed = quantise_linears(
            system,
            # A tied embedding asks too, and is then given what the head has.
            lambda site: schemes[found.widths.get(site.name, head)],
            with_head=self.head,
            skip=self.skip,
            with_embeddings=self.embeddings,
            progress=ctx.progress,
        )
        with torch.no_grad():
            measured = _divergence.mean_kl(dense, _divergence.logits_of(packed.model, kept))
        facts = {
            **packed.facts,
            **self.facts(found),
            "mixed_measured_kl_nats": measured,
            "mixed_measured_kl_tokens": kept.numel(),
        }
        return replace(packed, facts=facts)

    def search(self, system: System, ctx: Context) -> Search:
        """Measure the sensitivities and choose the widths; the model stays as it is.

        Raises:
            SpecError: the budget is below what the narrowest widths take.
            InputError: the calibration text is too short.
        """
        weights = _parts.weights_of(
            system.model,
            with_head=self.head,
            with_embeddings=self.embeddings,
            skip=self.skip,
        )
        parts = _parts.parts_of(weights, self.granularity)
        rounding = _parts.Rounding(self.group, self.symmetric, self.zero_point)
        least = sum(rounding.stored_bits(weight, self.choices[0]) for weight in weights)
        total = sum(weight.parameter().numel() for weight in weights)
        _budget.enough(self.budget, least / total)
        calibration = rows(self, system, ctx)
        tokens = torch.cat(calibration.batches)
        exact = (
            _divergence.in_float32(system.model) if self.precision == "float32" else nullcontext()
        )
        with exact:
            table = _sensitivity.measure(
                system,
                tokens,
                parts,
                choices=self.choices,
                rounding=rounding,
                progress=ctx.progress,
            )
        choice = table.choose(self.budget)
        widths = {
            name: choice.bits[entry.part] for entry in table.entries for name in entry.members
        }
        return Search(table, choice, widths, tokens, calibration.facts)

    def facts(self, found: Search) -> dict[str, JsonValue]:
        """What the search says about itself."""
        return {
            "calibration": found.calibration,
            "mixed_sensitivity": found.table.document(found.choice.bits),
            "mixed_sensitivity_tokens": found.table.tokens,
            "mixed_budget_bits": self.budget,
            "mixed_reached_bits": found.choice.cost / found.table.parameters,
            "mixed_parts_by_bits": {
                str(bits): count for bits, count in _budget.widths(found.choice.bits).items()
            },
            "mixed_predicted_kl_nats": found.table.predicted(found.choice.bits),
            "mixed_as_intn": self.as_intn(found),
        }

    def as_intn(self, found: Search) -> dict[str, JsonValue]:
        """Parameters of the `quant/intn` that packs the same layers at the same widths."""
        bits, layers = _overrides.suggest(found.widths, found.patterns())
        same = ("group", "symmetric", "zero_point", "activations", "head", "embeddings", "skip")
        params = self.model_dump(mode="json", include=set(same), exclude_defaults=True)
        return {**params, "bits": bits, "layers": list(layers)}
