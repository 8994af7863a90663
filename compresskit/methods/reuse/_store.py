"""What a store of prefixes is: it knows which tokens are where, and never touches a tensor.

    lookup(tokens) ──► Match: slots of the longest stored prefix, held
         │                      a slot is a place in memory for the rows of `unit` tokens
    extend(match, write) ──►  new slots for what was not there; `write` fills them
         │                      least recently used ones make room
    release(match) ──►  nothing is held any more

What is held is not evicted. `_rows.py` has the memory that the slots number, `_step.py` does the
three calls around a forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Statistics:
    """Counts since the store was made; tokens unless said otherwise."""

    lookups: int = 0
    """Prompts looked up."""
    hits: int = 0
    """Prompts of which some tokens were not computed."""
    bypassed: int = 0
    """First passes that were not looked up: padded, several rows, or positions of the caller's."""
    prompt_tokens: int = 0
    """Tokens of the prompts looked up."""
    hit_tokens: int = 0
    """Those that were not computed."""
    inserted_tokens: int = 0
    evicted_tokens: int = 0
    """Left the device to make room."""
    spilled_tokens: int = 0
    """Of the evicted ones, those that went to host memory."""
    fetched_tokens: int = 0
    """Came back from host memory."""


@dataclass
class Match:
    """The stored prefix of one prompt, held until it is released."""

    tokens: Sequence[int]
    slots: list[int]
    """Where the prefix is, in order; the last one may be only partly of use."""
    length: int
    """Tokens of the prompt that are stored."""
    held: Any = None
    """The store's own."""
    keys: list[bytes] = field(default_factory=list)
    """The store's own."""


class Write(Protocol):
    """Puts rows into slots."""

    def __call__(self, slots: Sequence[int]) -> None:
        """Fill `slots` with the rows that follow the match, in order."""


class Store(ABC):
    """Finds the longest stored prefix; one request at a time."""

    def __init__(self, slots: int, unit: int, identity: str) -> None:
        """Be empty.

        Args:
            slots: places there are.
            unit: tokens that a slot holds.
            identity: of the model and cache method whose rows are stored (`hf.rows.Layout`).
        """
        self.slots, self.unit, self.identity = slots, unit, identity
        self.statistics = Statistics()

    @abstractmethod
    def lookup(self, tokens: Sequence[int], salt: str = "") -> Match:
        """Find and hold the longest prefix of `tokens` stored under the same `salt`."""

    @abstractmethod
    def extend(self, match: Match, write: Write) -> None:
        """Store what follows `match.length` in its tokens, as far as there is room.

        `write` is called once with the new slots, before anyone can find them: if it fails, nothing
        has been stored.
        """

    @abstractmethod
    def release(self, match: Match) -> None:
        """Let the slots of `match` be evicted again, from now on as the most recently used."""

    @property
    @abstractmethod
    def stored_tokens(self) -> int:
        """Tokens on the device whose rows can be found."""
