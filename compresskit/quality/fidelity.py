"""How far the artefact's predictions are from the baseline's, on the same tokens.

Perplexity can stay the same, or even improve, while a model moves away from the one it was made
from; the divergence of the two distributions cannot. Because both are scored on the same tokens,
differences are paired, which shrinks their error far below that of either perplexity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compresskit import stats
from compresskit.record import Distribution, Fidelity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compresskit.quality.protocol import Plan

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


class Scores(NamedTuple):
    """Per-token scores, windows by positions: a few bytes per token are all that is kept."""

    nll: NDArray[np.float32]
    baseline_nll: NDArray[np.float32]
    kl: NDArray[np.float32]
    agree: NDArray[np.bool_]

    @classmethod
    def empty(cls, windows: int, positions: int) -> Scores:
        """Room for so many; `fill` overwrites it."""
        first, second, third = (np.zeros((windows, positions), dtype=np.float32) for _ in range(3))
        return cls(first, second, third, np.zeros((windows, positions), dtype=np.bool_))


def fidelity(scores: Scores, plan: Plan, baseline_digest: str) -> Fidelity:
    """Summarise paired scores."""
    agreement = float(scores.agree.mean())
    deltas = [
        stats.mean(ours) - stats.mean(theirs)
        for ours, theirs in zip(scores.nll, scores.baseline_nll, strict=True)
    ]
    return Fidelity(
        protocol_id=plan.protocol_id,
        baseline_digest=baseline_digest,
        scored_tokens=plan.scored_tokens,
        kl=distribution(scores.kl),
        top1_agreement=agreement,
        top1_stderr=math.sqrt(agreement * (1 - agreement) / scores.agree.size),
        delta_nll=stats.mean(deltas),
        delta_nll_stderr=stats.standard_error(deltas),
        baseline_nll=float(scores.baseline_nll.mean(dtype=np.float64)),
        window_kl=tuple(stats.mean(row) for row in scores.kl),
        window_top1=tuple(int(row.sum()) for row in scores.agree),
        window_tokens=tuple(len(row) for row in scores.agree),
    )


def distribution(values: NDArray[np.float32]) -> Distribution:
    """Mean, standard error over windows (rows), percentiles and maximum over all tokens."""
    at = np.percentile(values.astype(np.float64), PERCENTILES)
    percentiles = {f"p{q:g}": float(value) for q, value in zip(PERCENTILES, at, strict=True)}
    windows = [stats.mean(row) for row in values]
    return Distribution(
        mean=stats.mean(windows),
        stderr=stats.standard_error(windows),
        percentiles={**percentiles, "max": float(values.max())},
    )
