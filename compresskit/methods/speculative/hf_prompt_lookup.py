"""transformers' prompt lookup, as a row to check ours against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, JsonValue

from compresskit.hf.assisted import bursts
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.speculative import _foreign

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.system import Chunk, Request, System
    from compresskit.traits import Effects


@final
class HFPromptLookup(AbstractMethod):
    """Decode with transformers' prompt lookup: a cross-check, not a method of ours.

    Paper: Saxena 2023, Prompt Lookup Decoding (github.com/apoorvumang/prompt-lookup-decoding); the
    code is transformers'.
    Differs: from speculative/ngram in that the first earlier match is followed, a match ends at the
    end of the text, and drafts may reach past the last token asked for.
    Cost: a search of the whole text for every step, on the device; one row; greedy.
    """

    stage: ClassVar[Stage] = Stage.DECODE
    example: ClassVar[Mapping[str, JsonValue]] = {"draft": 4, "max_match": 2}

    draft: int = Field(10, ge=1)
    """Most tokens drafted in a row per step."""
    max_match: int = Field(2, ge=1)
    """Longest n-gram looked up; longer ones are tried first."""

    def effects(self) -> Effects:
        """One row, transformers' own cache and loop."""
        return _foreign.EFFECTS

    def apply(self, system: System, ctx: Context) -> System:
        """Decode in transformers' loop."""
        return replace(system, decode=self.decoded)

    def decoded(self, system: System, request: Request) -> Iterator[Chunk]:
        """Decode `request`, one chunk for each of transformers' steps."""
        request = _foreign.single(system, request, "speculative/hf_prompt_lookup")
        settings = {
            "prompt_lookup_num_tokens": self.draft,
            "max_matching_ngram_size": self.max_match,
        }
        found = bursts(system.model, request, settings)
        with closing(found):
            yield from _foreign.chunks(found, request.tokens.device)
