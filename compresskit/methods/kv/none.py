"""No cache at all: the whole text is run again for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from compresskit.hf.recompute import new_text, recompute_step
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._wrapped import put, whole
from compresskit.traits import Trait

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


@final
class NoCache(AbstractMethod):
    """Hold no keys and values; recompute them from the whole text at every step.

    The other end of the scale: how much time caching itself saves, and how much memory it costs.

    Paper: Pope et al. 2022, Efficiently Scaling Transformer Inference, arXiv 2211.05102 (what the
    cache is for).
    Differs: token ids are held, 8 bytes each, so that a step has a text to run.
    Cost: the compute of a step grows with the text; no bytes per token worth naming.
    """

    stage: ClassVar[Stage] = Stage.CACHE

    def effects(self) -> Effects:
        """Exact, and tokens are taken back by forgetting their ids.

        Shapes change, and the whole text goes through one mask: no tree of drafts has a place in it.
        """
        return whole(takes=(Trait.STATIC_SHAPES, Trait.SLOT_MASKS), needs=(Trait.OWN_LOOP,))

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the step and the cache."""
        changed = put(
            system, new_text, cache="none: the text is run again", nominal={"keep_tokens": 0}
        )
        return replace(changed, step=recompute_step(system.model))
