"""transformers' assisted generation with a draft model, as a row to check ours against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, JsonValue

from compresskit.hf.assisted import bursts, drafting
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.speculative import _foreign
from compresskit.methods.speculative._beside import named, refuse_other_tokens, refuse_unable
from compresskit.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.method import Outline
    from compresskit.system import Chunk, Request, System
    from compresskit.traits import Effects


@final
class HFAssisted(AbstractMethod):
    """Decode with transformers' `generate(assistant_model=...)`: a cross-check, not a method of ours.

    Paper: Leviathan et al. 2022, arXiv 2211.17192; the code is transformers'.
    Differs: from transformers' defaults by a fixed number of drafted tokens (by default it ends a
    draft at the first token of less than 0.4 probability, and shifts that bound as it goes). From
    speculative/draft_model by drafting before the prompt has been read: the first chunk already
    holds drafts.
    Cost: as speculative/draft_model, with transformers' own loop around it; one row; greedy.
    """

    stage: ClassVar[Stage] = Stage.DECODE
    example: ClassVar[Mapping[str, JsonValue]] = {"model": "tiny:draft", "draft": 4}

    model: str = "tiny:draft"
    """The draft, named as any model; its tokenizer must be the target's."""
    revision: str | None = None
    """Pin of a Hub model: a commit, branch or tag."""
    draft: int = Field(4, ge=1)
    """Tokens drafted in a row per step."""

    def effects(self) -> Effects:
        """One row, transformers' own cache and loop."""
        return _foreign.EFFECTS

    def vet(self, target: Outline, find: Callable[[ModelSpec], Outline]) -> None:
        """Refuse a draft of another tokenizer, a larger one, and one that cannot roll back."""
        draft = find(ModelSpec(name=self.model, revision=self.revision))
        refuse_unable(target, draft)
        refuse_other_tokens(target, draft)

    def apply(self, system: System, ctx: Context) -> System:
        """Load the draft; decode in transformers' loop."""
        spec = ModelSpec.model_validate(
            {"name": self.model, "revision": self.revision, "dtype": ctx.dtype}
        )
        draft = ctx.load(spec)
        facts = {**system.facts, **named(self.model, draft)}
        return replace(system, drafts=(*system.drafts, draft), facts=facts, decode=self.decoded)

    def decoded(self, system: System, request: Request) -> Iterator[Chunk]:
        """Decode `request`, one chunk for each of transformers' steps."""
        request = _foreign.single(system, request, "speculative/hf_assisted")
        assistant = system.drafts[-1].model
        with drafting(assistant, self.draft):
            found = bursts(system.model, request, {}, assistant_model=assistant)
            with closing(found):
                yield from _foreign.chunks(found, request.tokens.device)
