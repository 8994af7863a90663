"""How long to draft: as long as what is accepted pays for what it costs.

    after every step    was each drafted token what came out?  ──►  a_1, a_2, ... (decayed counts)
    before every step   k in 0..limit of the largest  E(k) / (k·c + v(k + 1) + h)

E, c, v and h are those of `compresskit.stats.speculation`. What a draft was worth is seen in the text
itself: a drafted token is right if it came out in its place, whether it was verified or held back.

    cheap drafter    drafts in full every time, and what k leaves over is held back: its tokens are
                     still compared with the text, so that no pass is spent on learning
    costly drafter   is asked for k tokens; where k is 0 it is asked again after some steps, twice as
                     many each time that it was not worth it

A lookup says how long its match was, and a long match is right more often: its counts are kept apart
by that length, and lean on those of all drafts where they are few. A place that was never reached
leans on the one before it. The constants were set by replaying lookups over eight answers of one model
at three kinds of costs; the settings tried differ by up to 4 %.

The choice uses tokens that are part of the text already and never the ones drafted in this step, so
what comes out is distributed as without it. To drop a token for what it is would bias the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.methods.speculative._draft import NOTHING, ROOT, Draft, memory_bytes
from compresskit.stats.speculation import FLAT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.methods.speculative._draft import Drafter, Evidence
    from compresskit.stats.speculation import Costs

DECAY = 0.95
"""What a count is worth after another one of its kind: the last twenty or so decide."""
FIRST, LATER = 0.5, 0.7
"""Acceptance where nothing is known: of a first token, and of one behind an accepted token, which is
right more often."""
WEIGHT = 2.0
"""Observations that this is worth at first; it fades like them."""
CHEAP = 0.02
"""Steps of one token: a drafter that takes less per token always drafts."""
AGAIN, LONGEST_PAUSE = 4, 64
"""Steps until a costly drafter is tried again, first and at most."""
LONG_MATCH = 8
"""Matches from here on are one kind."""


class Rates:
    """Acceptance by kind of draft and place, of those before it accepted: decayed counts."""

    def __init__(self) -> None:
        """Know nothing."""
        self._counts: dict[tuple[int, int], tuple[float, float, float]] = {}

    def note(self, kind: int, place: int, right: bool) -> None:
        """Count a token at `place` (from 0) of a draft; kind 0 is every draft."""
        for key in ((0, place), (kind, place))[: 2 if kind else 1]:
            tried, hits, lean = self._counts.get(key, (0.0, 0.0, WEIGHT))
            self._counts[key] = tried * DECAY + 1, hits * DECAY + right, lean * DECAY

    def of(self, kind: int, length: int) -> list[float]:
        """Acceptance at the first `length` places of a draft of that kind."""
        rates: list[float] = []
        general = FIRST
        for place in range(length):
            unknown = max(general, LATER) if place else FIRST
            general = self._leaning(0, place, unknown)
            # Another kind of draft tells half of it: the kinds are there because they differ.
            rates.append(self._leaning(kind, place, (general + unknown) / 2) if kind else general)
        return rates

    def _leaning(self, kind: int, place: int, prior: float) -> float:
        tried, hits, lean = self._counts.get((kind, place), (0.0, 0.0, WEIGHT))
        return (hits + lean * prior) / (tried + lean)


class Guess:
    """A draft, and how far the text has followed it."""

    def __init__(self, draft: Draft) -> None:
        """Nothing has come out yet."""
        self.kind = min(draft.match, LONG_MATCH)
        self._tokens, self._parents = draft.tokens, draft.parents
        self._at, self._depth = ROOT, 0

    def follow(self, token: int, rates: Rates) -> bool:
        """Compare with the next token of the text; whether there is more to compare."""
        options = self._next()
        if not options:
            return False
        place = next((one for one in options if self._tokens[one] == token), None)
        rates.note(self.kind, self._depth, place is not None)
        if place is None:
            return False
        self._at, self._depth = place, self._depth + 1
        return bool(self._next())

    def _next(self) -> Sequence[int]:
        """Places of the tokens that could be next."""
        if self._parents is None:
            return range(self._depth, min(self._depth + 1, len(self._tokens)))
        return [place for place, parent in enumerate(self._parents) if parent == self._at]


class Adaptive:
    """A drafter that stops another one where its tokens would no longer pay."""

    def __init__(self, inner: Drafter, costs: Costs = FLAT) -> None:
        """Wrap `inner`; costs are in steps of one token."""
        self.inner, self.costs = inner, costs
        self.wants_features = inner.wants_features
        self.rates = Rates()
        self.cheap = costs.draft < CHEAP
        self._guesses: list[list[Guess]] = []
        self._pause, self._waited = AGAIN, 0
        self._known: dict[int, float] = {}

    def observe(self, new: Sequence[Sequence[int]], evidence: Evidence | None = None) -> None:
        """Judge the guesses by what came out, then let the drafter learn."""
        self._guesses = self._guesses or [[] for _ in new]
        for row, tokens in enumerate(new):
            for token in tokens:
                self._guesses[row] = [
                    guess for guess in self._guesses[row] if guess.follow(token, self.rates)
                ]
        self.inner.observe(new, evidence)

    def draft(self, limits: Sequence[int]) -> list[Draft]:
        """Draft as deep as it pays, in each row."""
        if self.cheap:
            drafts = self.inner.draft(limits)
            chosen = [draft.down_to(self._depth(draft)) for draft in drafts]
        else:
            drafts = chosen = self._costly(limits)
        for row, draft in enumerate(drafts):
            if draft.tokens:
                self._guesses[row].append(Guess(draft))
        return chosen

    def memory_bytes(self) -> int | None:
        """Of the drafter; the counts are a few numbers."""
        return memory_bytes(self.inner)

    def _depth(self, draft: Draft) -> int:
        """How deep a draft that is there already is worth verifying."""
        kind = min(draft.match, LONG_MATCH)
        if draft.parents is None:
            most = len(draft.tokens)
            return self._best(self.rates.of(kind, most), range(most + 1))
        depths = draft.depths()
        rates = self.rates.of(kind, max(depths, default=0))
        # A tree pays for all its branches down to that depth.
        widths = [sum(deep <= depth for deep in depths) for depth in range(len(rates) + 1)]
        return self._best(rates, widths)

    def _costly(self, limits: Sequence[int]) -> list[Draft]:
        most = max(limits)
        rates = self.rates.of(0, max(most, 0))
        best = self._best(rates, range(len(rates) + 1))
        if best == 0 < most:
            self._waited += 1
            if self._waited < self._pause:
                return [NOTHING] * len(limits)
            self._waited, self._pause = 0, min(2 * self._pause, LONGEST_PAUSE)
            best = 1
        elif best:
            self._waited, self._pause = 0, AGAIN
        return self.inner.draft([min(limit, best) for limit in limits])

    def _best(self, rates: Sequence[float], widths: Sequence[int]) -> int:
        """The depth of the largest speed-up; the smallest of equals.

        As `stats.speculation.best_length`, with what a step costs looked up: it is asked at every step.
        """
        best, depth = 1.0 / self._cost(0), 0
        tokens = reached = 1.0
        for place, rate in enumerate(rates, 1):
            reached *= rate
            tokens += reached
            found = tokens / self._cost(widths[place])
            if found > best:
                best, depth = found, place
        return depth

    def _cost(self, width: int) -> float:
        known = self._known.get(width)
        if known is None:
            known = self._known[width] = self.costs.step(width)
        return known
