"""Prompt lookup: what followed the last words earlier will follow them again.

... the cat sat on | the mat . Then the cat sat on | ?
    └─ match ──────┘ └─ draft ─┘    └─ last words ─┘
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self, final

from pydantic import Field, JsonValue, model_validator

from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._draft import Draft, EachRow
from compresskit.methods.speculative._held import held_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.methods.speculative._draft import Drafter
    from compresskit.system import Request, System


class Lookup:
    """An index from n-grams of one text to where they end, kept up to date token by token."""

    def __init__(
        self, *, longest: int, shortest: int, match: Literal["last", "first"], draft: int
    ) -> None:
        """Index n-grams of `shortest` to `longest` tokens; draft at most `draft` tokens."""
        self.text: list[int] = []
        self.sizes = range(longest, shortest - 1, -1)
        self.newest = match == "last"
        self.limit = draft
        # Size of the n-gram -> the n-gram -> position of the token that followed it.
        self.follower: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in self.sizes}

    def observe(self, tokens: Sequence[int]) -> None:
        """Append `tokens`, indexing the n-grams that each of them follows."""
        text = self.text
        for token in tokens:
            end = len(text)
            for size, table in self.follower.items():
                if size <= end:
                    gram = tuple(text[end - size :])
                    if self.newest or gram not in table:
                        table[gram] = end
            text.append(token)

    def draft(self, limit: int) -> Draft:
        """Propose what followed the longest n-gram that ends the text and occurred before."""
        text = self.text
        for size in self.sizes:
            start = self.follower[size].get(tuple(text[-size:]))
            if start is not None:
                period = len(text) - start
                guess = text[start : start + min(limit, self.limit)]
                # A match that reaches the end of the text goes on into its own draft: a loop.
                while len(guess) < min(limit, self.limit):
                    guess.append(guess[len(guess) - period])
                return Draft(guess, match=size)
        return Draft([])

    def memory_bytes(self) -> int:
        """Of the text and the tables."""
        return held_bytes(self.text, self.follower)


@final
class NGram(Speculative):
    """Draft the tokens that followed the newest n-gram earlier in the text, and verify them.

    Paper: Saxena 2023, Prompt Lookup Decoding (github.com/apoorvumang/prompt-lookup-decoding);
    verification as in Leviathan et al. 2022, arXiv 2211.17192.
    Differs: looks up the latest earlier match by default (the original takes the first), keeps an
    index instead of searching the text again, and continues a match that runs into the end of the
    text periodically, so that a loop is drafted in full length.
    Cost: one forward pass over 1 + draft tokens instead of one; a dictionary entry per token and
    n-gram length on the host. No draft, no cost: such a step is a plain one.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"draft": 4, "max_match": 2}
    replayable: ClassVar[bool] = True

    max_match: int = Field(3, ge=1)
    """Longest n-gram looked up; longer ones are tried first."""
    min_match: int = Field(1, ge=1)
    """Shortest n-gram looked up."""
    match: Literal["last", "first"] = "last"
    """Which earlier occurrence to follow."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_match > self.max_match:
            raise ValueError(f"min_match {self.min_match} is above max_match {self.max_match}")
        return self

    def drafter(self, system: System, request: Request) -> Drafter:
        """A fresh index for each row."""
        return EachRow(
            [
                Lookup(
                    longest=self.max_match,
                    shortest=self.min_match,
                    match=self.match,
                    draft=self.draft,
                )
                for _ in request.tokens
            ]
        )
