"""A small model says how the text goes on, the large one checks all of it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, JsonValue

from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._beside import (
    NEEDED,
    named,
    refuse_other_tokens,
    refuse_unable,
)
from compresskit.methods.speculative._model_drafter import WIDTHS, ModelDrafter
from compresskit.spec import ModelSpec
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.method import Context, Outline
    from compresskit.methods.speculative._draft import Drafter
    from compresskit.system import Request, System


@final
class DraftModel(Speculative):
    """Draft with a smaller model of the same vocabulary, token after token, and verify.

    Paper: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
    Trees as in Miao et al. 2023, SpecInfer, arXiv 2305.09781 (one model, expanded at the first token).
    Differs: guesses are drawn at the request's own temperature and filters, so that acceptance is as
    high as the two models allow; the draft reads the prompt after the target's first token, not
    before, so that the first token waits for nobody.
    Cost: a pass of the draft per guess, its weights and its cache; one pass of the target over
    1 + draft tokens instead of one token.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"model": "tiny:draft", "draft": 4}

    model: str = "tiny:draft"
    """The draft, named as any model; its tokenizer must be the target's."""
    revision: str | None = None
    """Pin of a Hub model: a commit, branch or tag."""
    methods: tuple[str, ...] = ()
    """Methods applied to the draft, as typed on the command line, such as "quant/int8"."""
    draft: int = Field(4, ge=1)
    """Tokens drafted in a row per step: as many passes of the draft model."""

    branches: int = Field(1, ge=1)
    """Likeliest first tokens that are all followed. More than one makes a tree of greedy guesses, also
    for sampled requests, and a pass over draft x branches tokens."""

    def effects(self) -> Effects:
        """As all; more branches than one need caches whose slots may be masked."""
        found = super().effects()
        return found.model_copy(update={"requires": found.requires | self._masks()})

    def widest(self) -> int:
        """All branches."""
        return self.draft * self.branches

    def vet(self, target: Outline, find: Callable[[ModelSpec], Outline]) -> None:
        """Refuse a draft of another tokenizer, a larger one, and one that cannot roll back."""
        draft = find(ModelSpec(name=self.model, revision=self.revision))
        refuse_unable(target, draft)
        refuse_other_tokens(target, draft)

    def prepare(self, system: System, ctx: Context) -> System:
        """Load the draft in the run's type, and prepare it for the run's decode mode."""
        spec = ModelSpec.model_validate(
            {"name": self.model, "revision": self.revision, "dtype": ctx.dtype}
        )
        draft = ctx.load(spec, self.methods, NEEDED | self._masks())
        facts = {**system.facts, **named(self.model, draft)}
        widths = WIDTHS
        if self.branches > 1:
            # What was accepted, and the tree before its last level.
            widths = (1, *sorted({self.draft + 1, max(self.draft - 1, 1) * self.branches}))
        draft = ctx.finish(replace(draft, widths=widths))
        return replace(system, drafts=(*system.drafts, draft), facts=facts)

    def drafter(self, system: System, request: Request) -> Drafter:
        """The draft with an empty cache."""
        return ModelDrafter(system.drafts[-1], request, draft=self.draft, branches=self.branches)

    def _masks(self) -> frozenset[Trait]:
        """What tokens of one pass that see different slots need, of the target and of the draft."""
        trees = frozenset({Trait.SLOT_MASKS, Trait.PADDED_BATCH})
        return trees if self.branches > 1 else frozenset()
