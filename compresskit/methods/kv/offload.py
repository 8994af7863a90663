"""Keys and values in host memory, brought to the GPU layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

from compresskit.hf.wrapped import offloaded
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._wrapped import EVERYTHING, put, whole
from compresskit.traits import Trait

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


@final
class OffloadedCache(AbstractMethod):
    """Keep every layer's keys and values in host memory but while that layer runs (CUDA).

    The next layer is fetched on a stream of its own while the current one computes.

    Paper: Sheng et al. 2023, FlexGen, arXiv 2303.06865 (section 3); the class is transformers'
    offloaded `DynamicCache`.
    Differs: not ours; no disk tier, no schedule across batches.
    Cost: each step moves the whole cache over the bus, once in each direction. The bytes held count
    host memory too: what falls is the peak on the GPU, so look at that.
    """

    stage: ClassVar[Stage] = Stage.CACHE

    def effects(self) -> Effects:
        """Nothing is lost. Whether a fetch under way survives a rollback is not known: none then."""
        return whole(takes=(Trait.ROLLBACK, Trait.STATIC_SHAPES), needs=(Trait.CUDA,))

    def apply(self, system: System, ctx: Context) -> System:
        """Make offloaded caches."""
        config = system.model.config
        return put(
            system,
            lambda capacity: offloaded(config),
            cache="all tokens, in host memory",
            nominal=EVERYTHING,
        )
