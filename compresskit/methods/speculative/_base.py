"""What all speculative methods share: how long to draft, how to judge, what it needs.

A method says how it guesses (`drafter`); the loop, the verifier and the batch are the same for all.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.speculative._draft import memory_bytes
from compresskit.methods.speculative._length import Adaptive
from compresskit.methods.speculative._loop import speculate
from compresskit.methods.speculative._verify import typical, verify
from compresskit.stats.speculation import FLAT
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.methods.speculative._draft import Drafter
    from compresskit.methods.speculative._verify import Judge
    from compresskit.stats.speculation import Costs
    from compresskit.system import Chunk, Request, System

NEEDS = frozenset({Trait.OWN_LOOP, Trait.LOGITS, Trait.ROLLBACK, Trait.TRAINED})
RAGGED = (
    (Trait.BATCH, Trait.SLOT_MASKS),
    (Trait.BATCH, Trait.PADDED_BATCH),
    (Trait.PADDED_BATCH, Trait.SLOT_MASKS),
)
"""Rows that grow by different lengths leave slots to be masked."""


class Speculative(AbstractMethod):
    """Draft, verify, keep what the model would have said itself."""

    stage: ClassVar[Stage] = Stage.DECODE
    trees: ClassVar[bool] = False
    """Drafts may be trees, whose tokens see different slots in one pass."""
    replayable: ClassVar[bool] = False
    """Drafts depend on the texts alone, so a recorded text gives the very drafts of the model."""

    draft: int = Field(8, ge=1)
    """Most tokens drafted in a row per step."""
    accept: Literal["exact", "typical"] = "exact"
    """exact: output as without drafts (greedy: equal; sampled: equally distributed). typical: also
    what the model finds likely enough; not lossless."""
    threshold: float = Field(0.09, gt=0, le=1)
    """typical: a token more likely than this is always accepted."""
    alpha: float = Field(0.3, gt=0, le=1)
    """typical: the bound is alpha · exp(-entropy), where that is lower."""
    # Left out where they are as ever, so that runs of fixed length keep their digests.
    length: Annotated[
        Literal["fixed", "adaptive"], Field(exclude_if=lambda one: one == "fixed")
    ] = "fixed"
    """fixed: up to `draft` tokens in every step. adaptive: as many of them as pay, by what was accepted
    so far and what a pass costs; lossless as well."""
    costs: Annotated[Literal["probed", "flat"], Field(exclude_if=lambda one: one == "probed")] = (
        "probed"
    )
    """adaptive: what a pass and a draft cost. probed: timed at set-up, so counts differ between runs.
    flat: 2 % of a step per token of a pass, and nothing for drafting; the same everywhere."""

    def effects(self) -> Effects:
        """Any loop of ours whose cache takes tokens back; batches where slots may be masked."""
        lossy = frozenset({Trait.LOSSLESS}) if self.accept == "typical" else frozenset()
        also = frozenset({Trait.SLOT_MASKS, Trait.PADDED_BATCH}) if self.trees else frozenset()
        return Effects(requires=NEEDS | also, removes=lossy, only_with=RAGGED)

    def apply(self, system: System, ctx: Context) -> System:
        """Decode in the speculative loop; where costs are to be probed, once the step is finished."""
        system = replace(
            self.prepare(system, ctx), decode=self.speculate, widths=(1, self.widest() + 1)
        )
        if self.length == "fixed" or self.costs == "flat":
            return system
        # The trial drafts in full length: what drafting costs is to be seen.
        plain = functools.partial(self.speculate, length="fixed")

        def probe(finished: System) -> System:
            costs = ctx.step_cost(replace(finished, decode=plain))
            return replace(finished, decode=functools.partial(self.speculate, costs=costs))

        return replace(system, settle=(*system.settle, probe))

    def prepare(self, system: System, ctx: Context) -> System:
        """Load or make what the drafter needs; nothing by default."""
        return system

    def widest(self) -> int:
        """Most tokens of one draft, all branches together."""
        return self.draft

    @abstractmethod
    def drafter(self, system: System, request: Request) -> Drafter:
        """A drafter for the rows of `request`, knowing nothing yet."""

    def judge(self) -> Judge:
        """The rule of acceptance."""
        if self.accept == "typical":
            return functools.partial(typical, threshold=self.threshold, alpha=self.alpha)
        return verify

    def speculate(
        self,
        system: System,
        request: Request,
        *,
        length: Literal["fixed", "adaptive"] | None = None,
        costs: Costs = FLAT,
    ) -> Iterator[Chunk]:
        """Decode `request` with a fresh drafter; `length` stands in for the field."""
        drafter = self.drafter(system, request)
        if (length or self.length) == "adaptive":
            drafter = Adaptive(drafter, costs)
        yield from speculate(system, request, drafter, self.judge())
        if system.tell is not None and (held := memory_bytes(drafter)) is not None:
            system.tell("drafter_bytes", held)
