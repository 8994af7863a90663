"""The cache that transformers makes by itself, as a row of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

from compresskit.hf.cache import new_dynamic
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._wrapped import EVERYTHING, put, whole
from compresskit.traits import Trait

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


@final
class DynamicKV(AbstractMethod):
    """Use transformers' growing cache, which is also what an empty stack uses.

    A control: its numbers must be those of the dense row, bit for bit, and whatever differs between
    the two rows in time is noise.

    Paper: Pope et al. 2022, Efficiently Scaling Transformer Inference, arXiv 2211.05102 (what the
    cache is for); the class is transformers' `DynamicCache`.
    Differs: not at all.
    Cost: every step copies each layer's rows to append one. The compiled mode has a static cache, so
    there this row is refused (see kv/static).
    """

    stage: ClassVar[Stage] = Stage.CACHE

    def effects(self) -> Effects:
        """Nothing is lost; the tensors grow from step to step."""
        return whole(takes=(Trait.STATIC_SHAPES,))

    def apply(self, system: System, ctx: Context) -> System:
        """Make the cache that the model would make for itself."""
        config = system.model.config
        return put(
            system,
            lambda capacity: new_dynamic(config),
            cache="all tokens, growing tensors",
            nominal=EVERYTHING,
        )
