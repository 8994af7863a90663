"""The learning rate over a training: up in a line, then down along half a cosine.

    rate
     1 |   /‾‾‾-.
       |  /      `-.
       | /          `-._
 floor |/               `---      share of the budget that is spent: 0 ... warmup ... 1

Paper: Loshchilov and Hutter 2017, SGDR, arXiv 1608.03983 (the cosine; one period, no restarts).
Differs: by the share of the budget instead of the step, since minutes and joules are budgets too.
"""

from __future__ import annotations

import math


def factor(spent: float, *, warmup: float, floor: float) -> float:
    """The learning rate as a part of its peak, when the share `spent` of the budget is used up.

    Begins at `floor`, reaches 1 at `warmup`, ends at `floor` at 1 and stays there.
    """
    if spent < warmup:
        return floor + (1 - floor) * spent / warmup
    share = min((spent - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2
