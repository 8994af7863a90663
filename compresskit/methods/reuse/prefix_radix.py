"""Prompts in a tree of tokens: the longest common beginning is found to the token.

prompt 1   "Translate to French: good morning"       computed and stored
prompt 2   "Translate to French: good night"         all up to " night" copied
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, JsonValue

from compresskit.methods.reuse._radix import RadixStore
from compresskit.methods.reuse._reuse import Opened, Reuse, slots_in
from compresskit.methods.reuse._rows import RowMemory

if TYPE_CHECKING:
    from compresskit.hf.rows import Layout
    from compresskit.system import System


@final
class PrefixRadix(Reuse):
    """Keep the keys and values of prompts in a radix tree over tokens.

    Paper: Zheng et al. 2023, SGLang, arXiv 2312.07104 (RadixAttention).
    Differs: requests get copies, and run one at a time in the order they come (no cache-aware
    scheduling); answers are not stored; matches below `shortest` are computed again, so that a common
    BOS token alone is no hit. Rows are whatever the cache holds (codes of an int8 cache, for
    instance).
    Cost: `capacity` bytes at once; a walk down the tree, and a sort of its leaves when room is
    needed; one copy of the prefix on a hit, one of the new rows after every prompt, both part of the
    time to first token. Stored rows are the very numbers that the storing request computed. The rest
    of the prompt is computed in a pass of its own, whose sums may be ordered otherwise than in one
    pass over the whole prompt: logits equal those of a prefill in these two chunks, and those of one
    pass up to rounding. Prompts of several rows, padded ones, or ones with positions of their own are
    computed as if there were no store. The prompts of speed passes are all distinct, so there the
    store costs and never helps: measure it with `compresskit replay`.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"shortest": 4, "capacity": 4_000_000}

    shortest: int = Field(16, ge=1)
    """Fewest stored tokens that are taken; below, they are computed again."""

    def open(self, system: System, layout: Layout) -> Opened:
        """Take the memory and number its rows."""
        size = layout.token_bytes
        slots = slots_in(self.capacity, size, parameter="capacity", what="the row of one token")
        memory = RowMemory(layout, slots=slots, unit=1, device=system.device.torch)
        return Opened(RadixStore(slots, layout.identity), memory)

    def fewest(self) -> int:
        """As the parameter says."""
        return self.shortest
