"""Weights and activations in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from compresskit_kernels.int8_dynamic_matmul import OP
from pydantic import JsonValue

from compresskit.methods.quant._linear import Scheme
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each
from compresskit.methods.quant.int8 import quantise

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System


@final
class Int8Dynamic(AbstractRowwise):
    """Store each linear weight as int8 per row and round activations to int8 per token (W8A8).

    Products of integers are summed exactly; a token's step is its own, so batches and speculative
    verification see the same numbers as one token alone.

    Paper: Yao et al. 2022, ZeroQuant, arXiv 2206.01861 (token-wise dynamic activations).
    Differs: weights per output row, no distillation.
    Cost: one float pass over the weights at load, no calibration; activations are rounded in every
    call. Outliers in the activations cost quality: `quant/smoothquant` moves them into the weights.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {}

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer."""
        scheme = Scheme(op=OP, bits=8, quantise=quantise)
        return Rounding(lambda site: scheme, self.skip)

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        return pack_each(self, system, ctx)
