"""Weights in 2 to 8 bits, a scale and an offset per group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from pydantic import JsonValue

from compresskit.methods.quant._group import Activations, Bits, Group, ZeroPoint
from compresskit.methods.quant._overrides import Layers, round_to_nearest
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.system import System


@final
class IntN(AbstractRowwise):
    """Store each linear weight in 2 to 8 bits with a scale and an offset per group (WnA16).

    `quant/int4` at any width, really packed: three bits take three. See there for groups, zero
    points and int8 activations.

    Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323 (its round-to-nearest baseline, grouped).
    Differs: no error compensation; the zero point is a float by default.
    Cost: one float pass over the weights at load, no calibration.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"bits": 3, "group": 32}

    bits: Bits = 3
    """Bits a code."""
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
            bits=self.bits,
            layers=self.layers,
            activations=self.activations,
            group=self.group,
            symmetric=self.symmetric,
            zero_point=self.zero_point,
        )

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        return pack_each(self, system, ctx)
