"""Keys and values as 8-bit integers with one scale per token and head.

x [B, K, T, D] ──► scale = max|x| / 127 per row ──► codes = round(x / scale)
                                                        │ stored
attention reads   codes * scale   of all tokens, old and new
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._coded import EFFECTS, PerTokenLayer
from compresskit.methods.kv._layers import install

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects


class Int8Layer(PerTokenLayer):
    """255 levels a row, symmetric, so that zero is exact; the error is at most half a scale."""

    def __init__(self, config: Any) -> None:
        """Hold nothing yet."""
        super().__init__(config, "int8")


@final
class Int8Cache(AbstractMethod):
    """Store keys and values as int8 codes with one bfloat16 scale per token and head.

    Paper: Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339 (symmetric absmax
    quantisation by row), applied to cache rows; the "per-token" layout of Liu et al. 2024, KIVI,
    arXiv 2402.02750, for both keys and values.
    Differs: no outlier decomposition and no full-precision tail. Attention reads the stored codes
    from the first forward pass on, the new tokens' own included, so the result does not depend on
    how the tokens are cut into passes: a window scored in one pass shows the same error as
    decoding, and tokens taken back leave no trace. Sliding-window layers stay as they are.
    Cost: `head_dim + 2` bytes per row instead of `2 * head_dim` (bfloat16) or `4 * head_dim`
    (float32). A step of up to 8 tokens reads the codes; a longer pass, such as a prompt, writes a
    full-precision copy of one layer's cache at a time.
    """

    stage: ClassVar[Stage] = Stage.CACHE

    def effects(self) -> Effects:
        """As of all caches with a scale per token."""
        return EFFECTS

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer an int8 cache."""
        config = system.model.config
        return install(
            system,
            lambda index: Int8Layer(config),
            cache="int8 codes, one bfloat16 scale per token and head",
            nominal={"bits": 8},
        )
