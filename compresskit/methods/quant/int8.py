"""Weights in 8 bits, one scale per output row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from compresskit_kernels.int8_matmul import OP, Int8Weight
from pydantic import JsonValue

from compresskit.methods.quant._linear import Scheme
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System


def quantise(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Int8Weight:
    """Round each row of `weight` (float32 `[N, K]`) to multiples of its largest magnitude / 127.

    Codes are taken against the scale as stored in `dtype`, which undoes most of its rounding:
    the error stays within scale / 2, plus 127 * 2^-9 scales at the ends of the range in bfloat16.
    """
    scales = (weight.abs().amax(dim=1) / 127).to(dtype)
    step = scales.float().where(scales > 0, 1.0).unsqueeze(1)
    codes = torch.round(weight / step).clamp(-127, 127).to(torch.int8)
    return Int8Weight(codes, scales)


@final
class Int8(AbstractRowwise):
    """Store each linear weight as int8 with one scale per output row (W8A16).

    Round to nearest against the row's absolute maximum; activations stay in 16 bits. The packed
    product runs in bfloat16 whatever the model computes in.

    Paper: Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339 (row-wise absmax).
    Differs: weight-only: no outlier decomposition, activations are not quantised.
    Cost: one float pass over the weights at load, no calibration; with more than 16 rows a CPU
    turns the codes back into floats in every call.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {}

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer."""
        scheme = Scheme(op=OP, bits=8, quantise=quantise)
        return Rounding(lambda site: scheme, self.skip)

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        return pack_each(self, system, ctx)
