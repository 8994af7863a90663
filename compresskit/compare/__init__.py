"""Compare stored results with stored results, and say only what the numbers bear.

    load ──► match ──► agree ──► checks ──► Comparison
             by digest  unlike     exact      bytes, tokens, forward passes, digests: equality
             or as      things     quality    the bound of a paired interval, not the point
             given      refused    clocks     time and joules: significant and big enough

`checks.CHECKS` is the one table of what is compared: metric, tier, tolerance, what must agree.
Nothing here imports torch: records can be compared on any machine.
"""

from compresskit.compare.checks import CHECKS
from compresskit.compare.compare import compare
from compresskit.compare.line import Check
from compresskit.compare.load import load
from compresskit.compare.outcome import TIERS, Comparison, Outcome, Row, Tier, Word

__all__ = [
    "CHECKS",
    "TIERS",
    "Check",
    "Comparison",
    "Outcome",
    "Row",
    "Tier",
    "Word",
    "compare",
    "load",
]
