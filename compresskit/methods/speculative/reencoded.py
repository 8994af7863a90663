"""A small model with a tokenizer of its own drafts in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, JsonValue

from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._beside import NEEDED, named, refuse_unable
from compresskit.methods.speculative._model_drafter import WIDTHS
from compresskit.methods.speculative._text_drafter import TextDrafter
from compresskit.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.method import Context, Outline
    from compresskit.methods.speculative._draft import Drafter
    from compresskit.system import Request, System


@final
class Reencoded(Speculative):
    """Draft with a model of another tokenizer: its text, encoded again, is the guess.

    A variant of speculative/draft_model for models that share no vocabulary; where they do, take
    that one. Guesses are greedy and have no q: sampled requests accept a guess with the target's
    probability of it, which is lossless, but accepts less than drawing would.

    Paper: Timor et al. 2025, Accelerating LLM Inference with Lossless Speculative Decoding Algorithms
    for Heterogeneous Vocabularies, arXiv 2502.05202 (string-level exact match).
    Differs: no search for where the two splits of a text meet: the newest few tokens are encoded again
    together with the guess, and if they come out otherwise the guess stands alone.
    Cost: as speculative/draft_model; on the host, the whole text is decoded and encoded again each
    step. Special tokens do not pass as text, so a chat template is not seen by the draft.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"model": "tiny:draft", "draft": 4}

    model: str = "tiny:draft"
    """The draft, named as any model."""
    revision: str | None = None
    """Pin of a Hub model: a commit, branch or tag."""
    methods: tuple[str, ...] = ()
    """Methods applied to the draft, as typed on the command line, such as "quant/int8"."""
    draft: int = Field(4, ge=1)
    """Tokens that the draft model says per step, and most tokens of the guess."""

    def vet(self, target: Outline, find: Callable[[ModelSpec], Outline]) -> None:
        """Refuse a larger draft, and one that cannot roll back."""
        refuse_unable(target, find(ModelSpec(name=self.model, revision=self.revision)))

    def prepare(self, system: System, ctx: Context) -> System:
        """Load the draft in the run's type, and prepare it for the run's decode mode."""
        spec = ModelSpec.model_validate(
            {"name": self.model, "revision": self.revision, "dtype": ctx.dtype}
        )
        draft = ctx.load(spec, self.methods, NEEDED)
        facts = {
            **system.facts,
            **named(self.model, draft),
            "draft_tokens_by": "text, encoded again by the target's tokenizer",
        }
        draft = ctx.finish(replace(draft, widths=WIDTHS))
        return replace(system, drafts=(*system.drafts, draft), facts=facts)

    def drafter(self, system: System, request: Request) -> Drafter:
        """The draft with an empty cache, and both tokenizers."""
        known = int(system.model.config.get_text_config().vocab_size)
        return TextDrafter(
            system.drafts[-1], system.tokenizer, request, draft=self.draft, known=known
        )
