"""Blocks of prompts under chained hashes: a prompt that begins like an earlier one starts later.

prompt 1   [block 0][block 1][block 2] rest          computed, three blocks stored
prompt 2   [block 0][block 1] another rest           two blocks copied, the rest computed
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit.errors import Conflict
from compresskit.methods.reuse._blocks import BlockStore
from compresskit.methods.reuse._host import HostTier
from compresskit.methods.reuse._reuse import Opened, Reuse, slots_in
from compresskit.methods.reuse._rows import RowMemory, Tiers

if TYPE_CHECKING:
    from compresskit.hf.rows import Layout
    from compresskit.system import System


@final
class PrefixBlock(Reuse):
    """Keep the keys and values of full blocks of prompts, found again by a chain of hashes.

    Paper: Kwon et al. 2023, PagedAttention, arXiv 2309.06180 (section 4.4); the chained hash and the
    order of eviction are those of vLLM's automatic prefix caching (vLLM documentation, "Automatic
    Prefix Caching").
    Differs: requests get copies, and run one at a time; answers are not stored; a whole prompt that
    is stored is reused but for its last token, where vLLM computes its last block again. Rows are
    whatever the cache holds (codes of an int8 cache, for instance), and the hash begins with a
    fingerprint of model, type and cache method.
    Cost: `capacity` bytes at once; one SHA-256 a block; one copy of the prefix on a hit, one of the
    new blocks after every prompt, both part of the time to first token. Stored rows are the very
    numbers that the storing request computed. The rest of the prompt is computed in a pass of its
    own, whose sums may be ordered otherwise than in one pass over the whole prompt: logits equal
    those of a prefill in these two chunks, and those of one pass up to rounding. Prompts of several
    rows, padded ones, or ones with positions of their own are computed as if there were no store.
    The prompts of speed passes are all distinct, so there the store costs and never helps: measure it
    with `compresskit replay`.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"block": 8, "capacity": 4_000_000}

    block: int = Field(16, ge=1)
    """Tokens of a block; only full blocks are stored."""
    host_capacity: int = Field(0, ge=0)
    """CUDA: bytes of pinned host memory for blocks that leave the device; 0: they are dropped."""

    def open(self, system: System, layout: Layout) -> Opened:
        """Take the memory and number its blocks."""
        on_cpu = system.device.kind == "cpu"
        if self.host_capacity and on_cpu:
            raise Conflict(
                "reuse/prefix_block: host_capacity is a second tier behind a GPU's memory, and this "
                "run is on a CPU, whose memory is the host's. Raise capacity instead."
            )
        size = self.block * layout.token_bytes
        what = f"one block of {self.block} tokens"
        slots = slots_in(self.capacity, size, parameter="capacity", what=what)
        memory = RowMemory(layout, slots=slots, unit=self.block, device=system.device.torch)
        host = None
        if self.host_capacity:
            places = slots_in(self.host_capacity, size, parameter="host_capacity", what=what)
            second = RowMemory(
                layout, slots=places, unit=self.block, device=torch.device("cpu"), pinned=True
            )
            host = HostTier(places, Tiers(memory, second))
        return Opened(BlockStore(slots, self.block, layout.identity, host), memory)
