"""Round one column after the other, and let the columns to come make up for the error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit.methods.quant import _group
from compresskit.methods.quant._calibrate import AbstractCalibrated, Walk
from compresskit.methods.quant._gptq import solve
from compresskit.methods.quant._group import Activations, Bits, Grid, Group, ZeroPoint

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.methods.quant._moments import Shared
    from compresskit.system import System


@final
class GPTQ(AbstractCalibrated):
    """Round column by column, each error made up for by the columns still to come.

    Block by block: the calibration text has passed the blocks before as they are after quantising,
    so later blocks also answer for the errors of earlier ones. Layers with one input share one
    second moment of it. A layer that saw fewer tokens than it has inputs is rounded to nearest:
    its second moment would be singular.

    Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323 (algorithm 1).
    Differs: weights of inputs that were never used are rounded to nearest, not set to zero; the
    output head is solved too; with act_order groups keep the grids of the original weight.
    Cost: two passes of the calibration text, a second moment [K, K] for each distinct input and its
    factorisation, N * K^2 operations a layer; nothing at run time.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"group": 32, "samples": 8, "length": 64}

    bits: Bits = 4
    """Bits a code."""
    group: Group = 64
    """Weights that share a scale, along the input (0: a whole row); a last group may be ragged."""
    symmetric: bool = False
    """Levels around zero without an offset, instead of from minimum to maximum."""
    zero_point: ZeroPoint = "float"
    """Without symmetry: a float offset, or an integer zero point as checkpoints store it."""
    activations: Activations = "float"
    """What the weights are multiplied with: 16-bit floats, or int8 rounded per token and group."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the mean diagonal of the second moment that is added to its diagonal."""
    act_order: bool = False
    """Round the inputs with the largest activations first."""

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        scheme = _group.scheme(
            bits=self.bits, activations=self.activations, group=self.group, **self._levels()
        )
        walk = Walk(self, system, ctx, scheme, "gptq")
        tally = _Tally()
        for _, seen in walk.blocks(products=True):
            for one in seen:
                self._quantise(one, walk, tally)
        top = walk.at_head(products=True)
        if top is not None:
            self._quantise(top, walk, tally)
        return walk.finish(objective_relative_to_rtn=tally.ratio())

    def _levels(self) -> dict[str, Any]:
        return {"symmetric": self.symmetric, "zero_point": self.zero_point}

    def _quantise(self, one: Shared, walk: Walk, tally: _Tally) -> None:
        """Solve all layers with one input at once, as if stacked on top of each other."""
        width = one.moments.absolute.numel()
        if one.moments.count < width:
            walk.round(one.sites, f"{one.moments.count} tokens for {width} inputs")
            return
        size = _group.group_size(self.group, width)
        weights = [site.weight().float() for site in one.sites]

        def fit(parts: torch.Tensor) -> Grid:
            return _group.fit(parts, bits=self.bits, **self._levels())

        solution = solve(
            torch.cat(weights),
            one.moments.hessian(),
            fit,
            size=size,
            damping=self.damping,
            act_order=self.act_order,
        )
        row = 0
        for site, weight in zip(one.sites, weights, strict=True):
            rows = slice(row, row := row + weight.shape[0])
            stored = solution.store(rows, size)
            tally.error += one.moments.error(stored.dequantise() - weight)
            tally.rounded += one.moments.error(walk.scheme.store(weight).dequantise() - weight)
            site.replace(walk.packing.pack(site, walk.scheme, stored=stored))


class _Tally:
    """Output errors on the calibration text, over all layers."""

    def __init__(self) -> None:
        self.error = self.rounded = 0.0

    def ratio(self) -> float:
        """The solved weights' error beside that of rounding to nearest."""
        return self.error / self.rounded if self.rounded else 1.0
