"""transformers' quantised cache with optimum-quanto behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field, JsonValue

from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._wrapped import quantised, rounded

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


@final
class HFQuanto(AbstractMethod):
    """Store keys and values as transformers' `QuantizedCache` does with optimum-quanto.

    A baseline, run as it is: every pass dequantises the whole cache, and whenever the residual is
    full the whole cache is quantised again. Sliding-window layers stay as they are.

    Paper: Liu et al. 2024, KIVI, arXiv 2402.02750, which it calls similar.
    Differs: from the paper in both points above, and keys are grouped like values, along the head
    dimension (quanto's axis 0: its axis -1 mixes heads, drifts, and fails at some lengths). From
    transformers in that groups which straddle heads, and cropping, are refused.
    Cost: a full-precision copy of the cache in each step, on a CPU slower than no quantisation;
    scale and zero point of the model's type for each group. quanto compiles a C++ extension at its
    first use.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    example: ClassVar[Mapping[str, JsonValue]] = {"group": 32, "residual": 16}

    bits: Literal[2, 4] = 4
    """Bits of a code."""
    group: int = Field(64, ge=8, multiple_of=8)
    """Numbers of a head that share a scale; must divide the head dimension."""
    residual: int = Field(128, ge=1)
    """Newest tokens after the prompt that wait unquantised; when so many are there, all are
    quantised."""

    def effects(self) -> Effects:
        """Floats are gone, and no token can be taken back."""
        return rounded()

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer a quantised cache."""
        return quantised(
            system,
            "quanto",
            cache=f"transformers quanto, {self.bits} bit, groups of {self.group}",
            bits=self.bits,
            nbits=self.bits,
            axis_key=0,
            axis_value=0,
            q_group_size=self.group,
            residual_length=self.residual,
        )
