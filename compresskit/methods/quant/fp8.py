"""Weights, and on request activations, in 8-bit floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from compresskit_kernels import fp8_dynamic_matmul, fp8_matmul
from compresskit_kernels.fp8_matmul import LARGEST, Fp8Weight
from pydantic import JsonValue

from compresskit.methods.quant._linear import Scheme
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit_kernels.dispatch import Op

    from compresskit.method import Context
    from compresskit.system import System


def quantise(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Fp8Weight:
    """Round each row of `weight` (float32 `[N, K]`) to e4m3 times its largest magnitude / 448.

    Codes are taken against the scale as stored in `dtype`. Clamped before the cast, since not
    every version of torch saturates there.
    """
    scales = (weight.abs().amax(dim=1) / LARGEST).to(dtype)
    step = scales.float().where(scales > 0, 1.0).unsqueeze(1)
    codes = (weight / step).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return Fp8Weight(codes, scales)


@final
class Float8(AbstractRowwise):
    """Store each linear weight as e4m3 with one scale per output row (W8A16, or W8A8 dynamic).

    With `activations = "fp8"` activations are rounded to e4m3 per token on their way into the
    product: multiplied as such by GPUs from Ada and Hopper on (compute capability 8.9). Elsewhere
    the same numbers are computed on wider units and the result is marked as simulated, without a
    speed. Weight-only is real everywhere.

    Paper: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433.
    Differs: scales per row and per token from the largest magnitude, nothing calibrated.
    Cost: one float pass over the weights at load; a CPU turns the codes back into floats, in
    every call of more than 16 rows for the whole weight.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {}

    activations: Literal["float", "fp8"] = "float"
    """What the weights are multiplied with: 16-bit floats, or e4m3 rounded per token."""

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer."""
        scheme = Scheme(op=self._op(), bits=8, quantise=quantise)
        return Rounding(lambda site: scheme, self.skip)

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        changed = pack_each(self, system, ctx)
        op = self._op()
        # What was chosen decides, not what the device could do: one layer on wider units and the
        # speed is that of something else.
        if op is fp8_matmul.OP or changed.kernels[op.name] == fp8_dynamic_matmul.REAL:
            return changed
        return replace(changed, simulated=(*changed.simulated, "quant/fp8"))

    def _op(self) -> Op[Fp8Weight]:
        return fp8_matmul.OP if self.activations == "float" else fp8_dynamic_matmul.OP
