"""transformers' cache of 8-bit floating-point numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._wrapped import quantised, rounded, unpadded
from compresskit.traits import Trait

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


@final
class HFFp8(AbstractMethod):
    """Store keys and values as transformers' fp8 cache does: e4m3 with one scale per layer and side.

    A baseline, run as it is: the scale is that of the first pass for ever, so a later key or value
    beyond the largest number of the prompt is clipped. Runs on any device: codes are converted, not
    multiplied. Sliding-window layers stay as they are.

    Paper: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433 (the format).
    Differs: not ours; needs a transformers that has it (5.23 does, 5.17 does not). From transformers in
    that cropping is refused. No padded batches: the scale is that of the whole batch, padding included.
    Cost: half the bytes of bfloat16; a full-precision copy of the cache in each step.
    """

    stage: ClassVar[Stage] = Stage.CACHE

    def effects(self) -> Effects:
        """Floats are gone, no token can be taken back, and rows of a batch share a scale."""
        return rounded(Trait.PADDED_BATCH)

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer an fp8 cache."""
        changed = quantised(
            system, "fp8", cache="transformers fp8 (e4m3), one scale per layer", bits=8
        )
        return unpadded(changed, "kv/hf_fp8")
