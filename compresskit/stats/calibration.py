"""How good the verdict is on a given machine: false alarms, power, the smallest effect it can see.

    recorded repetitions ──► residuals around 1 ──► 1 000 simulated comparisons ──► shares
                             (Noise)                of equal sides: false alarms
                                                    of a true slowdown: power

No distribution is assumed: the noise is drawn, with replacement, from what was recorded, outliers
included. The simulated comparisons go through the very rule that judges real ones
(`verdict.direction`); another rule can be put in its place to see what it would do.

What the simulation cannot know is how much two equal processes differ for good (where their memory
came to lie): each series is taken relative to its own median. Only the verdict of a real session
of equal arms shows that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from compresskit.stats.exact import wilson
from compresskit.stats.summary import coefficient_of_variation
from compresskit.stats.verdict import FACTOR, direction, significance

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from compresskit.stats.resample import Interval

    Values = NDArray[np.float64]

FEWEST = 20
"""Residuals (or rounds) below which resampling says little about a machine."""
WANTED = 0.95
"""Share of comparisons in which an effect must be found to count as visible."""
SIZES = (7, 8, 10, 15, 20)
EFFECTS = (1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5)
_GRID = tuple(round(1 + step / 200, 3) for step in range(2, 201))
"""Slowdowns among which the smallest visible one is searched: 1 % to 100 % in half percents."""

Rule = Callable[["Values", "Values"], int]
"""Given base and new times: 1 calls new slower, -1 faster, 0 makes no call."""


class Source(Protocol):
    """Where simulated measurements of two equal sides come from."""

    def draw(self, rng: np.random.Generator, trials: int, samples: int) -> tuple[Values, Values]:
        """Base and new times around 1, each [trials, samples]; equal indices are one round."""


@dataclass(frozen=True)
class Noise:
    """What repeated measurements of one thing look like, relative to its true value."""

    residuals: Values
    """[N] apart, or [N, 2]: both sides of the same round of an interleaved session."""

    @property
    def paired(self) -> bool:
        """Whether rounds are drawn whole, so that what hits both sides still hits both."""
        return self.residuals.ndim == 2

    @property
    def variation(self) -> float:
        """Coefficient of variation of one side."""
        return coefficient_of_variation(self.residuals.ravel().tolist()) or 0.0

    @classmethod
    def of_series(cls, series: Iterable[Sequence[float]]) -> Self:
        """Pool repetitions of several runs; a series of fewer than three adds nothing.

        Raises:
            ValueError: fewer than `FEWEST` samples, or one that is not a positive number.
        """
        return cls._of([residuals(one) for one in series if len(one) >= 3], "samples")

    @classmethod
    def of_rounds(cls, sessions: Iterable[tuple[Sequence[float], Sequence[float]]]) -> Self:
        """Pool the rounds of interleaved sessions, whether or not their sides were equal.

        Raises:
            ValueError: fewer than `FEWEST` rounds, or a sample that is not a positive number.
        """
        return cls._of(
            [
                np.stack([residuals(one), residuals(other)], axis=1)
                for one, other in sessions
                if len(one) >= 3
            ],
            "rounds",
        )

    @classmethod
    def _of(cls, parts: list[Values], what: str) -> Self:
        count = sum(len(part) for part in parts)
        if count < FEWEST:
            raise ValueError(
                f"{count} recorded {what} are too few to know the noise: {FEWEST} needed"
            )
        return cls(np.concatenate(parts))

    def draw(self, rng: np.random.Generator, trials: int, samples: int) -> tuple[Values, Values]:
        """Draw with replacement; the sides of a round are shuffled, so neither is favoured."""
        if not self.paired:
            drawn = self.residuals[rng.integers(len(self.residuals), size=(2, trials, samples))]
            return drawn[0], drawn[1]
        rounds = self.residuals[rng.integers(len(self.residuals), size=(trials, samples))]
        swapped = rng.random((trials, samples)) < 0.5
        one, other = rounds[..., 0], rounds[..., 1]
        return np.where(swapped, other, one), np.where(swapped, one, other)


def residuals(series: Sequence[float]) -> Values:
    """Each sample over the median of the others of its series.

    Over the median of all of them, the middle one of five would always be exactly 1 and the spread
    too small; leaving the sample itself out errs on the wide side, so on the side of doubt.

    Raises:
        ValueError: fewer than two samples, or one that is not a positive number.
    """
    values = np.asarray(list(series), dtype=float)
    if values.size < 2 or not ((values > 0) & np.isfinite(values)).all():
        raise ValueError("noise is taken from at least two samples, all of them positive")
    order = np.argsort(values, kind="stable")
    place = np.empty(values.size, dtype=int)
    place[order] = np.arange(values.size)
    ordered: Values = values[order]
    # In the order without itself, places from its own on move up by one.
    lower, upper = (values.size - 2) // 2, (values.size - 1) // 2
    others: Values = (ordered[lower + (place <= lower)] + ordered[upper + (place <= upper)]) / 2
    return values / others


def called(base: Values, new: Values, *, factor: float = FACTOR) -> int:
    """The rule of `verdict.judge` for pairs, without the interval, which makes no call."""
    ratio = float(np.exp(np.median(np.log(new) - np.log(base))))
    # Within the factor no p can make a call; most equal sides end here.
    if 1 / factor <= ratio <= factor:
        return 0
    return direction(ratio, significance(base, new, paired=True), factor=factor)


def false_alarms(
    source: Source, samples: int, *, trials: int = 1000, seed: int = 0, rule: Rule = called
) -> Interval:
    """Share of comparisons of equal sides in which `rule` calls one of them faster."""
    calls = _calls(source, samples, 1.0, trials, seed, rule)
    return wilson(int((calls != 0).sum()), trials)


def power(
    source: Source,
    samples: int,
    slowdown: float,
    *,
    trials: int = 1000,
    seed: int = 0,
    rule: Rule = called,
) -> Interval:
    """Share of comparisons in which a new side `slowdown` times as slow is called slower."""
    calls = _calls(source, samples, slowdown, trials, seed, rule)
    return wilson(int((calls > 0).sum()), trials)


def smallest_effect(
    source: Source, samples: int, *, trials: int = 1000, seed: int = 0, rule: Rule = called
) -> float | None:
    """Smallest slowdown that is found in 95 of 100 comparisons; None where not even 2.0 is.

    All slowdowns meet the same draws, so power grows with the slowdown and bisection finds the edge.
    """
    low, high = 0, len(_GRID)
    while low < high:
        middle = (low + high) // 2
        found = power(source, samples, _GRID[middle], trials=trials, seed=seed, rule=rule)
        low, high = (low, middle) if found.value >= WANTED else (middle + 1, high)
    return _GRID[low] if low < len(_GRID) else None


def _calls(
    source: Source, samples: int, slowdown: float, trials: int, seed: int, rule: Rule
) -> NDArray[np.int_]:
    base, new = source.draw(np.random.default_rng([seed, samples]), trials, samples)
    new = new * slowdown
    return np.array([rule(base[trial], new[trial]) for trial in range(trials)])


@dataclass(frozen=True)
class Calibration:
    """What the verdict is worth at one noise."""

    samples: int
    trials: int
    variation: float
    paired: bool
    residuals: int
    """Recorded samples, or rounds, that the noise was drawn from."""
    false_alarms: Interval
    power: dict[float, Interval]
    """By true slowdown, at `samples` a side."""
    smallest: dict[int, float | None]
    """Smallest visible slowdown by samples a side."""


def calibrate(
    noise: Noise,
    *,
    samples: int = 10,
    trials: int = 1000,
    seed: int = 0,
    factor: float = FACTOR,
    progress: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Simulate `trials` comparisons per cell: equal sides, `EFFECTS`, and the edge for each size."""

    def rule(base: Values, new: Values) -> int:
        return called(base, new, factor=factor)

    progress(f"{trials} comparisons of equal sides, {samples} samples a side")
    alarms = false_alarms(noise, samples, trials=trials, seed=seed, rule=rule)
    progress("true slowdowns")
    found = {
        effect: power(noise, samples, effect, trials=trials, seed=seed, rule=rule)
        for effect in EFFECTS
    }
    progress("the smallest effect by number of samples")
    smallest = {
        size: smallest_effect(noise, size, trials=trials, seed=seed, rule=rule)
        for size in sorted({*SIZES, samples})
    }
    return Calibration(
        samples=samples,
        trials=trials,
        variation=noise.variation,
        paired=noise.paired,
        residuals=len(noise.residuals),
        false_alarms=alarms,
        power=found,
        smallest=smallest,
    )
