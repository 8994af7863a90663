"""Weights in the microscaling format MXFP4: 4-bit floats, a power of two per 32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from compresskit_kernels.grouped_matmul import OP, GroupedWeight
from compresskit_kernels.packing import pack
from pydantic import JsonValue

from compresskit.methods.quant._float import (
    E2M1,
    E2M1_EXPONENT,
    e2m1_codes,
    power_of_two,
    rounding_mx,
    simulating,
)
from compresskit.methods.quant._group import grouped
from compresskit.methods.quant._linear import Scheme
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System

GROUP = 32
NOMINAL_BITS = 4 + 8 / GROUP


def quantise(weight: torch.Tensor) -> GroupedWeight:
    """Round `weight` (float32 `[N, K]`) to E2M1 times a power of two per 32 inputs."""
    rows, width = weight.shape
    groups = grouped(weight, GROUP)
    scales = power_of_two(groups.abs().amax(dim=2), E2M1_EXPONENT)
    codes = e2m1_codes(groups / scales.unsqueeze(2)).view(rows, -1)[:, :width]
    # A power of two is exact in bfloat16.
    return GroupedWeight(pack(codes, 4), scales.to(torch.bfloat16), width, GROUP, 4, table=E2M1)


@final
class MXFP4(AbstractRowwise):
    """Store each linear weight as E2M1 with a power-of-two scale per 32 inputs (MXFP4, W4A16).

    Really packed and multiplied as packed. With rounded activations there is no unit for it here
    (nor in an H100): they are rounded in float32 and the result is marked as simulated, without a
    speed.

    In memory a scale takes 16 bits here (4.5 bits a weight, the effective bits of the record); the
    format itself stores it in 8 (4.25, `nominal_bits_per_parameter`).

    Paper: Rouhani et al. 2023, Microscaling Data Formats for Deep Learning, arXiv 2310.10537.
    Differs: a group whose largest magnitude rounds up to a power of two gets the next scale, as
    checkpoints of compressed-tensors do, instead of a plain floor.
    Cost: one float pass over the weights at load, no calibration; rounding activations is slow.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {}

    activations: Literal["float", "fp8", "fp4"] = "float"
    """What the weights are multiplied with: 16-bit floats, or (simulated) MXFP8 or MXFP4."""

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer."""
        op = OP
        if self.activations != "float":
            kind = "e2m1" if self.activations == "fp4" else "e4m3"
            op = simulating(
                OP, f"mx{self.activations}_activations_matmul", rounding_mx(GROUP, kind)
            )
        scheme = Scheme(op, 4, quantise)
        return Rounding(lambda site: scheme, self.skip)

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        if self.activations != "float":
            system = replace(system, simulated=(*system.simulated, "quant/mxfp4"))
        facts = {**system.facts, "nominal_bits_per_parameter": NOMINAL_BITS}
        return pack_each(self, replace(system, facts=facts), ctx)
