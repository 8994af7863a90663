"""When a difference is called a difference.

Two conditions, both needed:

    significant   p of an exact test below `alpha`: chance alone does not look like this
    big enough    the ratio is beyond `factor`: somebody would care

              p < alpha and beyond the factor      better or worse
              whole interval within the factor     same
              anything else                        inconclusive: too few or too noisy samples

            test                                 ratio
    apart   Mann-Whitney                         of the medians
    paired  Mann-Whitney or signed rank,         median over the rounds
            whichever is surer

Pairs are judged by both tests, because each is blind where the other sees: signed rank looks through
a load that comes and goes, Mann-Whitney needs fewer samples on a quiet machine. Each fires by chance
in at most `alpha` of equal comparisons, so together in at most twice that, and the factor is still
to be passed.

With p < 0.002 fewer than seven samples a side can never fire (2 / C(12, 6) = 0.0022), so the
verdict is then `inconclusive` and says why; signed rank needs ten pairs, which is why ten is the
default of a run. The default factor is 1.05: already at 8 pairs and a spread of 3 % a true slowdown
of 10 % is found in more than 95 of 100 comparisons, which a factor of 1.10 by construction finds in
every second one (`compresskit calibrate` measures both on any machine).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compresskit.stats.exact import fewest_a_side, mann_whitney, signed_rank, smallest_p
from compresskit.stats.resample import Interval, median_ratio, ratio_of_medians

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

Word = Literal["better", "same", "worse", "inconclusive"]

ALPHA = 0.002
FACTOR = 1.05


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison of repeated measurements."""

    word: Word
    ratio: Interval
    """New over base, 95 % interval: of the medians, or for pairs the median over the rounds."""
    p: float
    """Of the surer test."""
    n_base: int
    n_new: int
    factor: float
    """The practical factor that was applied."""
    reason: str = ""
    """Why the verdict is inconclusive."""


def judge(
    base: Sequence[float],
    new: Sequence[float],
    *,
    lower_is_better: bool,
    paired: bool,
    factor: float = FACTOR,
    alpha: float = ALPHA,
) -> Verdict:
    """Compare repeated measurements of one quantity.

    `paired` says that equal indices were taken side by side. Swapping the sides swaps better and
    worse and changes nothing else.

    Raises:
        ValueError: a side is empty or holds a value that is not a positive number, pairs do not
            match, `factor` is below 1 or `alpha` is no probability.
    """
    if not (factor >= 1 and 0 < alpha < 1):
        raise ValueError(f"factor {factor:g} must be at least 1 and alpha {alpha:g} within (0, 1)")
    ratio = median_ratio(new, base) if paired else ratio_of_medians(new, base)
    p = significance(base, new, paired=paired)
    if smallest_p(len(base), len(new)) >= alpha:
        reason = (
            f"{len(base)} and {len(new)} samples can never reach p < {alpha:g}; "
            f"take at least {fewest_a_side(alpha)} a side"
        )
        return Verdict("inconclusive", ratio, p, len(base), len(new), factor, reason)
    side = direction(ratio.value, p, factor=factor, alpha=alpha)
    word, reason = _word(side, ratio, p, factor, lower_is_better=lower_is_better)
    return Verdict(word, ratio, p, len(base), len(new), factor, reason)


def significance(
    base: Sequence[float] | NDArray[np.float64],
    new: Sequence[float] | NDArray[np.float64],
    *,
    paired: bool,
) -> float:
    """Return p of the test, for pairs that of the surer of the two."""
    p = mann_whitney(base, new)
    return min(p, signed_rank(new, base)) if paired else p


def direction(ratio: float, p: float, *, factor: float = FACTOR, alpha: float = ALPHA) -> int:
    """The rule itself: 1 where the new side is larger, -1 where it is smaller, 0 for no call."""
    if p >= alpha:
        return 0
    return int(ratio > factor) - int(ratio < 1 / factor)


def _word(
    side: int, ratio: Interval, p: float, factor: float, *, lower_is_better: bool
) -> tuple[Word, str]:
    if side:
        return ("worse" if (side > 0) == lower_is_better else "better"), ""
    if 1 / factor <= ratio.low and ratio.high <= factor:
        return "same", ""
    if 1 / factor <= ratio.value <= factor:
        return "inconclusive", f"the interval leaves the factor {factor:.3g} open"
    return (
        "inconclusive",
        f"beyond the factor {factor:.3g}, but chance alone does as much: p = {p:.2g}",
    )
