"""Weights in 4 bits on the quantiles of a normal distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from pydantic import JsonValue

from compresskit.methods.quant._codebook import NF4, Block, scheme
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System


@final
class NormalFloat4(AbstractRowwise):
    """Store each linear weight as NF4 codes with the largest magnitude of its block (W4A16).

    Sixteen levels that a normally distributed weight uses equally often, times one scale per block
    of inputs. Really packed and multiplied as packed. Against an evenly spaced grid of equal bits
    it wins where weights have heavy tails, and loses where they are uniform.

    Paper: Dettmers et al. 2023, QLoRA, arXiv 2305.14314 (section 3, appendix E).
    Differs: scales and levels in bfloat16 instead of float32 and no double quantisation, so 4.25
    bits a weight at blocks of 64; blocks run along a row and never across its end.
    `quant/bnb4` is bitsandbytes' own implementation.
    Cost: one float pass over the weights at load, no calibration.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"block": 32}

    block: Block = 64
    """Weights that share a scale, along the input; a last block may be ragged."""

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer."""
        rounding = scheme(NF4, self.block)
        return Rounding(lambda site: rounding, self.skip)

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        return pack_each(self, system, ctx)
