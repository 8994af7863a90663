"""Weights in 4 bits, a scale and an offset per group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from pydantic import JsonValue

from compresskit.methods.quant._group import Activations, Group, ZeroPoint, quantise
from compresskit.methods.quant._overrides import Layers, round_to_nearest
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System

__all__ = ["Int4", "quantise"]


@final
class Int4(AbstractRowwise):
    """Store each linear weight as int4 with a scale and an offset per group of inputs (W4A16).

    Round to nearest. Activations stay in 16 bits, or are rounded to int8 per token and group on
    their way into the product (W4A8), which a CPU multiplies four times as fast. Groups of 32 with
    an offset are the grid of common 4-bit files (Q4_1): re-quantising such a file on it looks
    lossless, so the default is 64, and a warning is left in the facts when the error is too small
    to be true.

    Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323 (its round-to-nearest baseline, grouped).
    Differs: no error compensation; the zero point is a float by default.
    Cost: one float pass over the weights at load, no calibration.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"group": 32}

    group: Group = 64
    """Weights that share a scale, along the input (0: a whole row); a last group may be ragged."""
    symmetric: bool = False
    """Levels around zero without an offset, instead of from minimum to maximum."""
    zero_point: ZeroPoint = "float"
    """Without symmetry: a float offset, or an integer zero point as checkpoints store it."""
    activations: Activations = "float"
    """What the weights are multiplied with: 16-bit floats, or int8 rounded per token and group."""

    layers: Layers = ()
    """Other widths by layer: "pattern=bits" or "pattern=dense"; the first that matches wins."""

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer, but for what `layers` says."""
        return round_to_nearest(
            self,
            model,
            bits=4,
            layers=self.layers,
            activations=self.activations,
            group=self.group,
            symmetric=self.symmetric,
            zero_point=self.zero_point,
        )

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        return pack_each(self, system, ctx)
