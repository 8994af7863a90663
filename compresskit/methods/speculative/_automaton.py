"""A suffix automaton: every piece of a text, how often it occurs, and what followed it.

    text  a b c a b | ?      last ──link──► "a b", which also occurs earlier
                                              │ following: c (once)
                                              ▼
                                            "a b c" ──► a ──► b ──► ...

A state stands for pieces that end at the same places of the text; the longest of them has `length`
tokens. Its link leads to the longest shorter suffix that also ends elsewhere, so the link of the
whole text is the longest piece at its end that occurred before. Built token by token (Blumer et al.
1985, The smallest automaton recognizing the subwords of a text, Theoretical Computer Science 40): at
most two states a token, amortised constant time.

Occurrences are counted along the links of each new token, at most `NESTED` of them, the longest
pieces first. More than that many pieces end at one place only inside long repetitions, where the
short ones, whose counts then stand still, are never asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT, NONE = 0, -1
"""The state of the empty piece, and its link."""
NESTED = 64
"""Most repeated pieces counted per token."""


class Match(NamedTuple):
    """A piece of the text."""

    state: int
    length: int
    """Tokens."""


class Automaton:
    """The pieces of one text, which grows at its end; negative tokens separate and never follow."""

    def __init__(self) -> None:
        """Know the empty text."""
        self.following: list[dict[int, int]] = []
        """Of each state: token -> state of the piece that is longer by it."""
        self.link: list[int] = []
        self.length: list[int] = []
        self.count: list[int] = []
        """Occurrences."""
        self.newest: list[int] = []
        """Where the latest occurrence ends."""
        self.size = 0
        """Tokens of the text."""
        self.last = self._state({}, link=NONE, length=0, count=0, newest=0)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append `tokens` to the text."""
        for token in tokens:
            self._append(token)

    def repeated(self) -> Match:
        """The longest piece at the end of the text that occurs earlier too; may be empty."""
        state = max(self.link[self.last], ROOT)
        return Match(state, self.length[state])

    def find(self, tail: Iterable[int]) -> Match:
        """The longest end of `tail` that occurs anywhere in the text; may be empty."""
        state, length = ROOT, 0
        for token in tail:
            while state != ROOT and token not in self.following[state]:
                state = self.link[state]
                length = self.length[state]
            if token in self.following[state]:
                state, length = self.following[state][token], length + 1
        return Match(state, length)

    def likeliest(self, state: int) -> tuple[int, float] | None:
        """What followed a piece most often, the latest of equals, and its share; None if nothing did."""
        best, most, total = NONE, (0, 0), 0
        for token, after in self.following[state].items():
            if token >= 0:
                total += self.count[after]
                if (seen := (self.count[after], self.newest[after])) > most:
                    best, most = token, seen
        return (best, most[0] / total) if total else None

    def follow(
        self, match: Match, *, tokens: int, shortest: int, min_probability: float
    ) -> list[int]:
        """Go on from `match` by what is likeliest, at most so many tokens.

        Ends before the product of the shares falls below `min_probability`. A piece that nothing
        followed is shortened from its beginning, but not below `shortest` tokens: so a loop that
        reaches the end of the text goes round.
        """
        state, probability = match.state, 1.0
        found: list[int] = []
        while len(found) < tokens:
            while (step := self.likeliest(state)) is None:
                state = self.link[state]
                if state == NONE or self.length[state] < shortest:
                    return found
            token, share = step
            probability *= share
            if probability < min_probability:
                break
            found.append(token)
            state = self.following[state][token]
        return found

    def _append(self, token: int) -> None:
        self.size += 1
        at, length = self.last, self.length[self.last] + 1
        new = self._state({}, link=ROOT, length=length, count=0, newest=0)
        while at != NONE and token not in self.following[at]:
            self.following[at][token] = new
            at = self.link[at]
        if at != NONE:
            self.link[new] = self._exactly(at, token)
        self.last = at = new
        for _ in range(NESTED):
            if at == ROOT:
                break
            self.count[at] += 1
            self.newest[at] = self.size
            at = self.link[at]

    def _exactly(self, at: int, token: int) -> int:
        """The state of the longest piece of `at` and `token`, split off from a longer one if need be."""
        target = self.following[at][token]
        length = self.length[at] + 1
        if length == self.length[target]:
            return target
        clone = self._state(
            self.following[target].copy(),
            link=self.link[target],
            length=length,
            count=self.count[target],
            newest=self.newest[target],
        )
        while at != NONE and self.following[at].get(token) == target:
            self.following[at][token] = clone
            at = self.link[at]
        self.link[target] = clone
        return clone

    def _state(
        self, following: dict[int, int], *, link: int, length: int, count: int, newest: int
    ) -> int:
        self.following.append(following)
        self.link.append(link)
        self.length.append(length)
        self.count.append(count)
        self.newest.append(newest)
        return len(self.link) - 1
