"""Answers of earlier requests, in a store of limited size that forgets the oldest first.

    young  ◄── answers come in        full: it becomes the old one, and what was old is forgotten
    old    (complete)

A suffix automaton cannot lose the beginning of its text, so the store keeps two and forgets one of
them at a time: it holds between half of its capacity and all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.methods.speculative._automaton import Automaton, Match

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class History:
    """What was answered before, for all requests of one applied method."""

    def __init__(self, capacity: int) -> None:
        """Remember nothing yet, and never more than `capacity` tokens."""
        self.half = capacity // 2
        self.young, self.old = Automaton(), Automaton()
        self.answers: Sequence[Sequence[int]] = ()
        """Of the newest request, row by row; they grow while it is answered."""

    def begin(self, answers: Sequence[Sequence[int]]) -> None:
        """A request starts: remember what the one before has answered by now."""
        for answer in self.answers:
            self._add(answer)
        self.answers = answers

    def find(self, tail: Iterable[int]) -> tuple[Automaton, Match]:
        """The longest end of `tail` that was answered before; the newer of equals."""
        found = [(store, store.find(tail)) for store in (self.young, self.old)]
        return max(found, key=lambda one: one[1].length)

    def sizes(self) -> Iterator[int]:
        """Tokens held, the newer store first."""
        yield from (self.young.size, self.old.size)

    def _add(self, answer: Sequence[int]) -> None:
        # Its end is what a longer answer leaves; a mark that equals no token keeps it apart.
        kept = answer[-(self.half - 1) :]
        if not kept:
            return
        if self.young.size + len(kept) + 1 > self.half:
            self.young, self.old = Automaton(), self.young
        self.young.extend((*kept, -1 - self.young.size))
