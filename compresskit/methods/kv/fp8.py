"""Keys and values as 8-bit floating-point numbers with one scale per token and head.

x [B, K, T, D] ──► scale = max|x| / 448 per row ──► codes = e4m3(x / scale)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._coded import EFFECTS, PerTokenLayer
from compresskit.methods.kv._layers import install

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


@final
class Fp8Cache(AbstractMethod):
    """Store keys and values as e4m3 codes with one bfloat16 scale per token and head.

    Paper: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433 (e4m3).
    Differs: the scale is that of each row, computed when it arrives, not one of a whole tensor that
    was calibrated or frozen before, so nothing overflows and nothing has to be calibrated. The
    error is relative, 2^-4 of a number, where int8's is a share of the row's largest: better for
    rows with outliers, worse for the others. Attention reads the stored codes from the first pass
    on. Sliding-window layers stay as they are.
    Cost: as kv/int8, `head_dim + 2` bytes per row. No hardware for e4m3 is needed.
    """

    stage: ClassVar[Stage] = Stage.CACHE

    def effects(self) -> Effects:
        """As of all caches with a scale per token."""
        return EFFECTS

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer an e4m3 cache."""
        config = system.model.config
        return install(
            system,
            lambda index: PerTokenLayer(config, "fp8"),
            cache="e4m3 codes, one bfloat16 scale per token and head",
            nominal={"bits": 8},
        )
