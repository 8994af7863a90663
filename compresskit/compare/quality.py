"""Quality: what counts is the bound of the paired interval, never the point estimate.

Both records scored the same windows, so the difference is taken window by window and whole windows
are resampled. With d the degradation and t what is tolerated:

    low(d) > t          worse: even the kindest reading is too much
    high(d) < -t        better
    high(d) <= t        same: even the harshest reading is tolerable
    otherwise           inconclusive: more windows would tell
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit.compare.outcome import Outcome
from compresskit.stats import Interval, mcnemar, weighted_mean_difference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from compresskit.compare.line import Check, Judge
    from compresskit.compare.outcome import Word
    from compresskit.compare.two import Two
    from compresskit.record import GreedyComparison, Record

FEWEST_WINDOWS = 4
"""A bootstrap over fewer windows knows nothing of their spread."""
GREEDY_ALPHA = 0.05
"""Like the 95 % intervals of this tier; needs at least six prompts that changed sides."""
LENGTHS = (0.9, 1.1)
"""Band of the length ratio that MLPerf inference allows."""


class Windows(NamedTuple):
    """A quantity per window, and the scored tokens of each."""

    values: Sequence[float]
    tokens: Sequence[int]


def nll(record: Record) -> Windows | None:
    """Nats per scored token."""
    found = None if record.quality is None else record.quality.likelihood
    return None if found is None else Windows(found.window_nll, found.window_tokens)


def kl(record: Record) -> Windows | None:
    """KL from the dense run, nats per token."""
    found = None if record.quality is None else record.quality.fidelity
    return None if found is None else Windows(found.window_kl, found.window_tokens)


def top1(record: Record) -> Windows | None:
    """Share of positions where the dense run's favourite stayed the favourite."""
    found = None if record.quality is None else record.quality.fidelity
    if found is None:
        return None
    pairs = zip(found.window_top1, found.window_tokens, strict=False)
    return Windows([agreed / max(1, tokens) for agreed, tokens in pairs], found.window_tokens)


def tasks(when: str) -> Callable[[Record], Windows | None]:
    """Score of every prompt of the long-context tasks asked `when`, each prompt a window of its own."""

    def read(record: Record) -> Windows | None:
        found = None if record.quality is None else record.quality.tasks
        answers = [] if found is None else [one.answers.get(when) for one in found.results]
        scores = [score for one in answers if one is not None for score in one.scores]
        return Windows(scores, [1] * len(scores)) if scores else None

    return read


def by_window(read: Callable[[Record], Windows | None]) -> Judge:
    """Compare a quantity window by window."""

    def judge(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
        before, after = read(two.base), read(two.new)
        if before is None and after is None:
            return None
        if before is None or after is None:
            side = "base" if before is None else "new"
            return _not_compared(check, f"the {side} record has no such quality")
        if not before.values or not after.values:
            return _not_compared(check, "per-window values not stored")
        shapes = {len(before.values), len(after.values), len(before.tokens), len(after.tokens)}
        if tuple(before.tokens) != tuple(after.tokens) or len(shapes) > 1:
            return _not_compared(check, "the two records scored different windows")
        if min(before.tokens) <= 0:
            return _not_compared(check, "a window scored no token")
        delta = _difference(before, after)
        word, reason = _word(check, delta, tolerance or 0.0, len(before.values))
        return Outcome(
            tier=check.tier,
            metric=check.name,
            word=word,
            unit=check.unit,
            base=_weighted(before),
            new=_weighted(after),
            delta=delta,
            tolerance=tolerance,
            n_base=len(before.values),
            n_new=len(after.values),
            reason=reason,
            look=check.look,
        )

    return judge


def _difference(base: Windows, new: Windows) -> Interval:
    if tuple(base.values) == tuple(new.values):
        return Interval(0.0, 0.0, 0.0)
    return weighted_mean_difference(new.values, base.values, base.tokens)


def _weighted(windows: Windows) -> float:
    weighted = sum(v * n for v, n in zip(windows.values, windows.tokens, strict=True))
    return weighted / sum(windows.tokens)


def _word(check: Check, delta: Interval, tolerance: float, windows: int) -> tuple[Word, str]:
    low, high = delta.low, delta.high
    if check.better == "higher":
        low, high = -high, -low
    if (low, high) != (0.0, 0.0) and windows < FEWEST_WINDOWS:
        return "inconclusive", f"{windows} windows are too few for an interval"
    if low > tolerance:
        return "worse", ""
    if high < -tolerance:
        return "better", ""
    if high <= tolerance:
        return "same", ""
    return "inconclusive", f"the interval leaves a loss of more than {tolerance:g} open"


def _not_compared(check: Check, reason: str) -> Outcome:
    return Outcome(check.tier, check.name, "not compared", reason=reason, look=check.look)


def _greedy(two: Two) -> tuple[GreedyComparison, GreedyComparison] | None:
    before = None if two.base.quality is None else two.base.quality.greedy
    after = None if two.new.quality is None else two.new.quality.greedy
    return None if before is None or after is None else (before, after)


def exact_match(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """Prompts answered as the dense run answers them, paired: McNemar's test."""
    found = _greedy(two)
    if found is None:
        return None
    before, after = found
    if len(before.first_divergence) != len(after.first_divergence):
        return _not_compared(check, "the two records continued different prompts")
    pairs = [
        (one is None, other is None)
        for one, other in zip(before.first_divergence, after.first_divergence, strict=True)
    ]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    p = mcnemar(lost, won)
    word: Word = "inconclusive"
    reason = f"{lost} lost, {won} won of {len(pairs)}: too few to tell"
    if lost == won == 0:
        word, reason = "same", ""
    elif p < GREEDY_ALPHA:
        word, reason = ("worse" if lost > won else "better"), f"{lost} lost, {won} won"
    return Outcome(
        tier=check.tier,
        metric=check.name,
        word=word,
        unit=check.unit,
        base=before.exact_match,
        new=after.exact_match,
        p=p,
        n_base=len(pairs),
        n_new=len(pairs),
        reason=reason,
        look=check.look,
    )


def length_ratio(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """Length of the answers over the dense run's: within the band, or as it was."""
    found = _greedy(two)
    if found is None:
        return None
    before, after = (one.length_ratio for one in found)
    was_inside, inside = (LENGTHS[0] <= ratio <= LENGTHS[1] for ratio in (before, after))
    word: Word = "same" if inside or before == after else "worse" if was_inside else "inconclusive"
    if inside and not was_inside:
        word = "better"
    reason = "" if inside else f"outside {LENGTHS[0]:g} to {LENGTHS[1]:g}"
    return Outcome(
        tier=check.tier,
        metric=check.name,
        word=word,
        unit=check.unit,
        base=before,
        new=after,
        reason=reason,
        look=check.look,
    )
