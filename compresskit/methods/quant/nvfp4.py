"""Weights in NVFP4: 4-bit floats, an 8-bit float per 16, one factor for the whole weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from compresskit_kernels.grouped_matmul import OP, GroupedWeight
from compresskit_kernels.packing import pack
from pydantic import JsonValue

from compresskit.methods.quant._float import (
    E2M1,
    E2M1_LARGEST,
    E4M3_LARGEST,
    e2m1,
    e2m1_codes,
    e4m3,
    simulating,
)
from compresskit.methods.quant._group import grouped
from compresskit.methods.quant._linear import Scheme
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System

GROUP = 16
NOMINAL_BITS = 4 + 8 / GROUP


def magnification(largest: torch.Tensor) -> torch.Tensor:
    """What brings the scale of a group that holds `largest` to the largest E4M3 number; 1 for zero.

    It is the second scale as checkpoints store it: weights are divided by it.
    """
    factor = E4M3_LARGEST * E2M1_LARGEST / largest.float()
    return torch.where(torch.isfinite(factor), factor, 1.0)


def split(groups: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 scales `[N, g]` of `groups` `[N, g, 16]`, and the groups in units of scale / factor."""
    scales = e4m3(factor * (groups.abs().amax(dim=2) / E2M1_LARGEST))
    step = (scales / factor).unsqueeze(2)
    return scales, torch.where(step > 0, groups / step, 0.0)


def quantise(weight: torch.Tensor, factor: torch.Tensor | None = None) -> GroupedWeight:
    """Round `weight` (float32 `[N, K]`) to E2M1 times an E4M3 scale per 16 inputs / `factor`.

    Without `factor`, that of this weight.
    """
    rows, width = weight.shape
    factor = magnification(weight.abs().amax()) if factor is None else factor
    scales, units = split(grouped(weight, GROUP), factor)
    codes = e2m1_codes(units).view(rows, -1)[:, :width]
    # An E4M3 number is exact in bfloat16.
    stored = scales.to(torch.bfloat16)
    return GroupedWeight(
        pack(codes, 4), stored, width, GROUP, 4, table=E2M1, gain=1 / float(factor)
    )


class TwoScales(Scheme[GroupedWeight]):
    """Rows share one factor, so it is found before the weight is cut into slabs."""

    def store(self, weight: torch.Tensor) -> GroupedWeight:
        """Quantise a whole weight `[N, K]`."""
        factor = magnification(weight.abs().amax())
        return Scheme(self.op, self.bits, partial(quantise, factor=factor)).store(weight)


def round_inputs(x: torch.Tensor) -> torch.Tensor:
    """Round x `[M, K]` to NVFP4, with a second scale of its own for each token."""
    factor = magnification(x.abs().amax(dim=1, keepdim=True))
    scales, units = split(grouped(x.float(), GROUP), factor)
    rounded = e2m1(units) * (scales / factor).unsqueeze(2)
    return rounded.view(x.shape[0], -1)[:, : x.shape[1]]


@final
class NVFP4(AbstractRowwise):
    """Store each linear weight as E2M1 with an E4M3 scale per 16 inputs (NVFP4, W4A16).

    A second scale for the whole weight brings the first ones into the range of E4M3. Really packed
    and multiplied as packed. With rounded activations there is no unit for it here (nor in an
    H100): they are rounded in float32 and the result is marked as simulated, without a speed.

    In memory a scale takes 16 bits here (5 bits a weight, the effective bits of the record); the
    format itself stores it in 8 (4.5, `nominal_bits_per_parameter`).

    Paper: NVIDIA 2025, Pretraining Large Language Models with NVFP4, arXiv 2509.25149 (section 2).
    Differs: activations get their second scale per token and on the fly, not from calibration.
    Cost: one float pass over the weights at load, no calibration; rounding activations is slow.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"embeddings": True}

    activations: Literal["float", "fp4"] = "float"
    """What the weights are multiplied with: 16-bit floats, or (simulated) NVFP4."""

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer."""
        op = OP
        if self.activations == "fp4":
            op = simulating(OP, "nvfp4_activations_matmul", round_inputs)
        scheme = TwoScales(op, 4, quantise)
        return Rounding(lambda site: scheme, self.skip)

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        if self.activations == "fp4":
            system = replace(system, simulated=(*system.simulated, "quant/nvfp4"))
        facts = {**system.facts, "nominal_bits_per_parameter": NOMINAL_BITS}
        return pack_each(self, replace(system, facts=facts), ctx)
