"""What both prefix stores have in common as methods: parameters, traits, and putting one in place."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field

from compresskit.errors import SpecError
from compresskit.hf.rows import learn
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.reuse._step import PrefixStep
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from pydantic import JsonValue

    from compresskit.hf.rows import Layout
    from compresskit.methods.reuse._rows import RowMemory
    from compresskit.methods.reuse._store import Store
    from compresskit.system import System


class Opened(NamedTuple):
    """An empty store with its memory."""

    store: Store
    memory: RowMemory


class Reuse(AbstractMethod):
    """Parameters of both stores."""

    stage: ClassVar[Stage] = Stage.CACHE

    capacity: int = Field(256_000_000, ge=1)
    """Bytes of rows that are kept on the device; the memory is taken at once."""
    salt: str = ""
    """Requests share prefixes only under equal salts."""

    def effects(self) -> Effects:
        """Nothing is lost; shapes depend on what is stored.

        The rest of the prompt is computed in a pass of its own, as in chunked prefill: the numbers
        are those of that pass. OWN_CACHE goes because rows are stored as this cache has them: a
        cache method after this one would change what they are.
        """
        return Effects(
            requires=frozenset({Trait.OWN_CACHE, Trait.FULL_CONTEXT, Trait.OWN_LOOP}),
            removes=frozenset({Trait.OWN_CACHE, Trait.STATIC_SHAPES}),
        )

    def apply(self, system: System, ctx: Context) -> System:
        """Put an empty store in front of the step.

        Raises:
            Conflict: this cache holds something other than one row a token.
            SpecError: `capacity` does not hold a single block.
        """
        layout = learn(system)
        opened = self.open(system, layout)
        step = PrefixStep(
            system.step,
            layout=layout,
            store=opened.store,
            memory=opened.memory,
            salt=self.salt,
            shortest=self.fewest(),
        )
        # The cache of a request holds what it would without a store.
        facts: dict[str, JsonValue] = {"cache_nominal": {"keep_share": 1.0}, **system.facts}
        facts["prefix_store"] = self.describe(layout, opened.store)
        return replace(system, step=step, facts=MappingProxyType(facts))

    @abstractmethod
    def open(self, system: System, layout: Layout) -> Opened:
        """An empty store for rows of `layout`."""

    def fewest(self) -> int:
        """Fewest tokens worth taking from the store."""
        return 1

    def describe(self, layout: Layout, store: Store) -> dict[str, JsonValue]:
        """What a record says about the store."""
        return {
            "tokens_per_slot": store.unit,
            "slots": store.slots,
            "bytes_per_token": layout.token_bytes,
            "bytes": store.slots * store.unit * layout.token_bytes,
        }


def slots_in(capacity: int, slot_bytes: int, *, parameter: str, what: str) -> int:
    """How many slots `capacity` bytes hold.

    Raises:
        SpecError: not even one.
    """
    if capacity < slot_bytes:
        raise SpecError(
            f"{parameter} of {capacity} bytes is too small: {what} of this model takes {slot_bytes} "
            "bytes. Give at least that."
        )
    return capacity // slot_bytes
