"""Statistics of records, tables and comparisons: pure functions over numbers, no records, no torch.

summary      percentiles, medians, spread
resample     bootstrap intervals, paired and not
exact        tests by counting: Mann-Whitney, McNemar; Wilson's interval
verdict      better, same, worse or inconclusive
calibration  how often that verdict is wrong, by simulation with recorded noise
speculation  tokens and time per step of a speculative loop, from acceptance and costs
"""

from compresskit.stats.exact import (
    fewest_a_side,
    mann_whitney,
    mcnemar,
    signed_rank,
    smallest_p,
    wilson,
)
from compresskit.stats.resample import (
    Interval,
    median_ratio,
    ratio_of_medians,
    weighted_mean_difference,
)
from compresskit.stats.summary import (
    coefficient_of_variation,
    mean,
    median,
    percentile,
    standard_error,
)
from compresskit.stats.verdict import ALPHA, FACTOR, Verdict, Word, judge

__all__ = [
    "ALPHA",
    "FACTOR",
    "Interval",
    "Verdict",
    "Word",
    "coefficient_of_variation",
    "fewest_a_side",
    "judge",
    "mann_whitney",
    "mcnemar",
    "mean",
    "median",
    "median_ratio",
    "percentile",
    "ratio_of_medians",
    "signed_rank",
    "smallest_p",
    "standard_error",
    "weighted_mean_difference",
    "wilson",
]
