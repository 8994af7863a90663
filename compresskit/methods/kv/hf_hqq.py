"""transformers' quantised cache with hqq behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field, JsonValue

from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._wrapped import quantised, rounded, unpadded
from compresskit.traits import Trait

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


@final
class HFHqq(AbstractMethod):
    """Store keys and values as transformers' `QuantizedCache` does with hqq.

    A baseline, run as it is: every pass dequantises the whole cache, and whenever the residual is
    full the whole cache is quantised again. Sliding-window layers stay as they are.

    Paper: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models
    (Mobius Labs).
    Differs: cache rows instead of weights, grouped along the head dimension (hqq's axis 1; its axis 0
    would mix tokens and heads that lie far apart). From transformers in that groups which straddle
    heads, and cropping, are refused, and there is no 3-bit kind: hqq unpacks it for matrices
    only. No padded batches: hqq stops iterating by the error of the whole tensor, so what a row
    becomes depends on the others. Once hqq is installed, transformers imports it at every start.
    Cost: an optimisation over the whole cache at each flush, a full-precision copy of it in each
    step; scale and zero point of the model's type for each group.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    example: ClassVar[Mapping[str, JsonValue]] = {"residual": 16}

    bits: Literal[1, 2, 4, 8] = 4
    """Bits of a code."""
    group: int = Field(32, ge=8, multiple_of=8)
    """Numbers of a head that share a scale; must divide the head dimension, and leave a token as
    many groups as codes fit into a byte."""
    residual: int = Field(128, ge=1)
    """Newest tokens after the prompt that wait unquantised; when so many are there, all are
    quantised."""

    def effects(self) -> Effects:
        """Floats are gone, no token can be taken back, and rows of a batch are not independent."""
        return rounded(Trait.PADDED_BATCH)

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer a quantised cache."""
        changed = quantised(
            system,
            "hqq",
            cache=f"transformers hqq, {self.bits} bit, groups of {self.group}",
            bits=self.bits,
            packs=8 // self.bits,
            nbits=self.bits,
            axis_key=1,
            axis_value=1,
            q_group_size=self.group,
            residual_length=self.residual,
        )
        return unpadded(changed, "kv/hf_hqq")
