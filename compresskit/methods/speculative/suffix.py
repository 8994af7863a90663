"""Suffix decoding: the longest ending that occurred before goes on as it went on most often.

earlier   ... to be or not to be, that is ...      match   "not to be": 3 tokens
now       ... not to be | ?                        draft   ", that is": at most factor · 3

The longer the ending that matches, the longer the draft: a long match is rarely a coincidence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, JsonValue

from compresskit.methods.speculative._automaton import Automaton
from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._draft import Draft, EachRow
from compresskit.methods.speculative._held import held_bytes
from compresskit.methods.speculative._history import History

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.method import Context
    from compresskit.methods.speculative._draft import Drafter
    from compresskit.system import Request, System

REACH = 64
"""Tokens at the end of a text that are looked for in earlier answers."""
REPEATED = (
    "speculative/suffix keeps answers from request to request: a pass that asks a prompt again is "
    "drafted its earlier answer, and is faster than new prompts would be"
)


class SuffixRow:
    """One text and its pieces, with a view of what was answered before."""

    def __init__(self, method: Suffix, history: History | None) -> None:
        """Know no token yet."""
        self.method, self.history = method, history
        self.text = Automaton()
        self.tail: deque[int] = deque(maxlen=REACH)
        self.answer: list[int] = []

    def observe(self, tokens: Sequence[int]) -> None:
        """Append the prompt, then what is answered."""
        if self.text.size:
            self.answer.extend(tokens)
        self.text.extend(tokens)
        self.tail.extend(tokens)

    def draft(self, limit: int) -> Draft:
        """Propose what is likeliest after the longest ending that occurred before."""
        store, match = self.text, self.text.repeated()
        if self.history is not None:
            other, elsewhere = self.history.find(self.tail)
            if elsewhere.length > match.length:
                store, match = other, elsewhere
        method = self.method
        if match.length < method.min_match:
            return Draft([])
        tokens = store.follow(
            match,
            tokens=min(limit, method.draft, int(method.factor * match.length)),
            shortest=method.min_match,
            min_probability=method.min_probability,
        )
        return Draft(tokens, match=match.length)

    def memory_bytes(self) -> int:
        """Of the text's own pieces; the store of earlier answers is its owner's."""
        return held_bytes(vars(self.text), self.tail, self.answer)


class SuffixRows(EachRow):
    """The rows of a batch, and the store that they share."""

    def __init__(self, rows: Sequence[SuffixRow], history: History | None) -> None:
        """Remember what the request before was answered, if anything is remembered."""
        super().__init__(rows)
        self.history = history
        if history is not None:
            history.begin([row.answer for row in rows])

    def memory_bytes(self) -> int | None:
        """Of all rows; unknown with a store, which is too large to be counted at every request."""
        return super().memory_bytes() if self.history is None else None


@final
class Suffix(Speculative):
    """Draft what followed the longest repeated ending most often, the longer the ending the more.

    Paper: Oliaro et al. 2024, SuffixDecoding, arXiv 2411.04975.
    Differs: a suffix automaton instead of suffix trees; the longest match decides, not the best
    score over all matches; chains, no trees; earlier answers are kept on request only, and
    forgotten by halves of the capacity.
    Cost: one forward pass over 1 + draft tokens instead of one; on the host at most two states a
    token (about 460 bytes) for each text, and for each store of earlier answers.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"draft": 6, "factor": 2.0}
    replayable: ClassVar[bool] = True

    min_match: int = Field(1, ge=1)
    """Shortest ending that is followed, in tokens."""
    factor: float = Field(1.0, gt=0)
    """A draft is at most this many times as long as the match, rounded down."""
    min_probability: float = Field(0.1, ge=0, le=1)
    """A draft ends before its estimated probability, by counts of what followed, falls below this."""
    shared: bool = False
    """Also look in the answers of earlier requests; results then depend on the order of requests."""
    capacity: int = Field(65536, ge=4)
    """shared: tokens of earlier answers kept at most; the oldest are forgotten first."""

    def prepare(self, system: System, ctx: Context) -> System:
        """Make the store of earlier answers, if they are shared."""
        told: dict[str, JsonValue] = {"shared": self.shared}
        if not self.shared:
            return replace(system, facts={**system.facts, "suffix_history": told})
        warnings = system.facts.get("warnings")
        facts = {
            **system.facts,
            "suffix_history": {**told, "capacity_tokens": self.capacity},
            "warnings": [*(warnings if isinstance(warnings, list) else ()), REPEATED],
        }
        return replace(system, facts=facts, held={**system.held, HELD: History(self.capacity)})

    def drafter(self, system: System, request: Request) -> Drafter:
        """A fresh automaton for each row, beside the store of earlier answers."""
        history: History | None = system.held[HELD] if self.shared else None
        return SuffixRows([SuffixRow(self, history) for _ in request.tokens], history)


HELD = "speculative/suffix"
"""Where the system holds the store."""
