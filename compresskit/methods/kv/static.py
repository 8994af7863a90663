"""A cache whose tensors have their final size from the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

from compresskit.hf.cache import static
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._wrapped import EVERYTHING, put, whole
from compresskit.traits import Trait

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


@final
class StaticKV(AbstractMethod):
    """Allocate room for the prompt and the answer at once; shapes never change.

    What the compiled mode runs on, there with room rounded up to 128 tokens; in other modes it shows
    what preallocation alone does.

    Paper: Pope et al. 2022, Efficiently Scaling Transformer Inference, arXiv 2211.05102 (what the
    cache is for); the class is transformers' `StaticCache`.
    Differs: not ours; sized for each request rather than once for all.
    Cost: bytes for the whole request from the first token on, and attention over empty slots, which
    are masked; nothing is copied to append.
    """

    stage: ClassVar[Stage] = Stage.CACHE

    def effects(self) -> Effects:
        """Exact; static windows overwrite what they would have to give back."""
        effects = whole(takes=())
        return effects.model_copy(update={"only_with": ((Trait.ROLLBACK, Trait.SLOT_MASKS),)})

    def apply(self, system: System, ctx: Context) -> System:
        """Make static caches."""
        config = system.model.config
        return put(
            system,
            lambda capacity: static(config, capacity),
            cache="all tokens, tensors of the final size",
            nominal=EVERYTHING,
        )
