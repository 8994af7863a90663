"""How much a chi-square test sees.

If answers really follow r instead of p, Pearson's statistic over N draws is noncentral chi-square
with noncentrality N · sum (r - p)²/p (Cohen 1988, Statistical Power Analysis, chapter 7). So the
power asked for is a divergence times a number of draws, and each gives the other.
"""

from __future__ import annotations

import math

from scipy.special import chdtrc, chdtri, chndtrinc

ALPHA, POWER = 1e-3, 0.9


def noncentrality(degrees: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Noncentrality that a test of `degrees` at level `alpha` notices with chance `power`.

    >>> round(noncentrality(56), 1)
    62.2
    """
    return float(chndtrinc(chdtri(degrees, alpha), degrees, 1 - power))


def detectable(degrees: int, draws: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Smallest chi-square divergence that so many draws notice."""
    return noncentrality(degrees, alpha, power) / draws


def draws_for(degrees: int, divergence: float, alpha: float = ALPHA, power: float = POWER) -> int:
    """Draws that notice `divergence`.

    >>> draws_for(56, 0.1), draws_for(7, 0.01)
    (622, 3183)
    """
    return math.ceil(noncentrality(degrees, alpha, power) / divergence)


def p_value(statistic: float, degrees: int) -> float:
    """Chance of a chi-square at least so large."""
    return float(chdtrc(degrees, statistic))
