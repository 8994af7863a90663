"""When a difference is called a difference.

Two conditions, both needed:

    significant   exact Mann-Whitney p below `alpha`: chance alone does not look like this
    big enough    the ratio of medians is beyond `factor`: somebody would care

              p < alpha and beyond the factor      better or worse
              whole interval within the factor     same
              anything else                        inconclusive: too few or too noisy samples

With p < 0.002 fewer than seven samples a side can never fire (2 / C(12, 6) = 0.0022), so the
verdict is then `inconclusive` and says why. The default factor is 1.05: at 8 pairs and a spread of
3 % a true slowdown of 10 % is found in more than 95 of 100 comparisons, which a factor of 1.10 by
construction finds in every second one (`compresskit calibrate` measures both on any machine).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compresskit.stats.exact import mann_whitney, smallest_p
from compresskit.stats.resample import Interval, ratio_of_medians

if TYPE_CHECKING:
    from collections.abc import Sequence

Word = Literal["better", "same", "worse", "inconclusive"]

ALPHA = 0.002
FACTOR = 1.05


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison of repeated measurements."""

    word: Word
    ratio: Interval
    """New over base, 95 % interval."""
    p: float
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

    `paired` says that equal indices were taken side by side; it narrows the interval, the test is
    the same.

    Raises:
        ValueError: a side is empty or holds a value that is not positive.
    """
    ratio = ratio_of_medians(new, base, paired=paired)
    p = mann_whitney(base, new)
    word, reason = _word(ratio, p, factor, alpha, lower_is_better)
    if smallest_p(len(base), len(new)) >= alpha:
        sizes = f"{len(base)} and {len(new)} samples"
        word, reason = (
            "inconclusive",
            f"{sizes} can never reach p < {alpha:g}; take at least 7 a side",
        )
    return Verdict(word, ratio, p, len(base), len(new), factor, reason)


def _word(
    ratio: Interval, p: float, factor: float, alpha: float, lower_is_better: bool
) -> tuple[Word, str]:
    if p < alpha and ratio.value > factor:
        return ("worse" if lower_is_better else "better"), ""
    if p < alpha and ratio.value < 1 / factor:
        return ("better" if lower_is_better else "worse"), ""
    if 1 / factor <= ratio.low and ratio.high <= factor:
        return "same", ""
    return "inconclusive", f"the interval leaves the factor {factor:g} open"
