"""Weights in 4-bit floats with a scale per block, as in bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from pydantic import JsonValue

from compresskit.methods.quant._codebook import FP4, Block, scheme
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System


@final
class Float4(AbstractRowwise):
    """Store each linear weight as FP4 codes with the largest magnitude of its block (W4A16).

    The 4-bit float of QLoRA's comparison: a sign, two bits of exponent, one of mantissa. Mostly of
    interest beside `quant/nf4`, which loses a quarter less at the same bits. The formats of current
    hardware are `quant/mxfp4` and `quant/nvfp4`.

    Paper: Dettmers et al. 2023, QLoRA, arXiv 2305.14314 (the Float4 rows of its tables).
    Differs: scales and levels in bfloat16 instead of float32 and no double quantisation, so 4.25
    bits a weight at blocks of 64; blocks run along a row and never across its end.
    Cost: one float pass over the weights at load, no calibration.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"block": 32}

    block: Block = 64
    """Weights that share a scale, along the input; a last block may be ragged."""

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer."""
        rounding = scheme(FP4, self.block)
        return Rounding(lambda site: rounding, self.skip)

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        return pack_each(self, system, ctx)
