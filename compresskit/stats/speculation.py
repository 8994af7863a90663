"""What speculation should bring, from how much is accepted and what the passes cost.

    E(k) = 1 + a1 + a1·a2 + ... + a1···ak           tokens per verification of k drafted tokens
    S(k) = E(k) / (k·c + v(k + 1) + h)              speed-up over a step of one token

    a_i   acceptance of the i-th drafted token, those before it accepted
    c     time to draft a token          v(n)   time to verify n tokens in one pass
    h     time of the host per step      all of them in steps of one token: v(1) = 1

Equal a_i give the E = (1 - a^(k+1)) / (1 - a) of Leviathan et al. 2022, arXiv 2211.17192 (equation
1), and with v = 1, h = 0 their S (theorem 3.8). Neither holds of real drafts: acceptance falls along
a draft, and a wider pass is not free. So a_i is taken position by position and v from a probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Costs:
    """What the parts of a step cost, in steps of one token."""

    passes: tuple[tuple[int, float], ...] = ((1, 1.0),)
    """v: tokens of a pass and its cost, by rising width; the first is (1, 1.0)."""
    draft: float = 0.0
    """c, per drafted token."""
    host: float = 0.0
    """h, per step."""
    padded: bool = False
    """Passes are filled up to the next width there is, so that one pays for that."""

    def verify(self, tokens: int) -> float:
        """Cost of a pass over so many tokens: between two known widths a straight line.

        Beyond the widest the last slope goes on; with a single width known, passes cost the same.
        """
        if self.padded:
            wide = [cost for width, cost in self.passes if width >= tokens]
            return wide[0] if wide else self.passes[-1][1]
        if len(self.passes) == 1:
            return self.passes[0][1]
        steps = list(pairwise(self.passes))
        (low, cheap), (high, dear) = next(
            ((one, other) for one, other in steps if other[0] >= tokens), steps[-1]
        )
        return cheap + (dear - cheap) * (tokens - low) / (high - low)

    def step(self, drafted: int) -> float:
        """Cost of a step that drafts so many tokens, in a row or in the branches of a tree."""
        return drafted * self.draft + self.verify(drafted + 1) + self.host


FLAT = Costs(passes=((1, 1.0), (2, 1.02)))
"""A token more costs 2 % of a step: of no machine in particular, and the same on all of them."""


def expected_tokens(acceptance: Sequence[float]) -> float:
    """E of a draft as long as `acceptance`, which holds a_1, a_2, ...; the token behind it counts.

    >>> round(expected_tokens([0.8] * 4), 4), expected_tokens([])
    (3.3616, 1.0)
    """
    total = reached = 1.0
    for rate in acceptance:
        reached *= rate
        total += reached
    return total


def speed_up(acceptance: Sequence[float], costs: Costs) -> float:
    """S of a draft as long as `acceptance`.

    >>> round(speed_up([0.8] * 4, Costs(draft=0.05)), 3)
    2.801
    """
    return expected_tokens(acceptance) / costs.step(len(acceptance))


def best_length(acceptance: Sequence[float], costs: Costs) -> int:
    """The k in 0..len(acceptance) of the largest S; the smallest of equals."""
    lengths = range(len(acceptance) + 1)
    return max(lengths, key=lambda k: speed_up(acceptance[:k], costs))
