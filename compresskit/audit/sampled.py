"""Draw answers and test them against the exact cells.

Rows of one batch are as many draws, over several prompts; the statistics of the prompts add up.
Cells that fewer than `RARE` draws are expected in are pooled, one pool a prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from compresskit.audit import power
from compresskit.audit.answer import request_of
from compresskit.audit.document import SampledCheck
from compresskit.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from compresskit.audit.answer import Answer
    from compresskit.audit.cells import Cells, Key
    from compresskit.audit.document import Asked

RARE = 5
NEW = (2, 1)
"""Tokens asked for, in turn, in times of the depth; answers are left off after it. The longer ones
leave room for long drafts; the shorter ones for short ones, so that what follows a draft that is
accepted whole is looked at too."""
LEAST = 600
"""Fewest draws, unless told otherwise: fewer leave too few cells unpooled."""
AGAIN = 4
"""Times as many draws when a suspicion is tried again."""


def enough(cells: Sequence[Cells], asked: Asked) -> int:
    """Draws that notice a divergence of `asked.detect`, in whole rounds of the prompts.

    More draws leave fewer cells to be pooled, which takes more draws: repeated until it settles.
    """
    draws = LEAST
    while True:
        needed = power.draws_for(
            max(1, degrees(cells, draws)), asked.detect, asked.alpha, asked.power
        )
        if needed <= draws:
            return -(-draws // len(cells)) * len(cells)
        draws = needed


def degrees(cells: Sequence[Cells], draws: int) -> int:
    """Degrees of freedom of the test with so many draws."""
    return sum(len(_pooled(one.law, draws / len(cells))) - 1 for one in cells)


def sampled(
    answer: Answer,
    cells: Sequence[Cells],
    asked: Asked,
    draws: int,
    device: torch.device,
    *,
    first_seed: int,
) -> SampledCheck:
    """Draw `draws` answers in batches, each with a seed of its own, and test them.

    Raises:
        RunError: an answer has fewer tokens than were asked for.
    """
    counts: list[Counter[Key]] = [Counter() for _ in cells]
    drafts: list[tuple[int, int]] | None = []
    turn = 0
    for call in range(-(-draws // asked.batch)):
        rows = [(turn + row) % len(cells) for row in range(asked.batch)]
        turn += asked.batch
        request = request_of(
            [cells[row].prompt for row in rows],
            NEW[call % len(NEW)] * asked.depth,
            asked.sampling,
            device,
            seed=first_seed + call,
        )
        answered = answer(request, asked.depth)
        for row, tokens in zip(rows, answered.rows, strict=True):
            if len(tokens) < asked.depth:
                raise RunError(
                    f"an answer of {request.max_new_tokens} tokens, without a stop token, has "
                    f"{len(tokens)}: what is audited must not end earlier."
                )
            counts[row][cells[row].cell(tokens)] += 1
        if answered.drafts is None or drafts is None:
            drafts = None
        else:
            drafts += answered.drafts
    return _tested(cells, counts, asked, drafts)


def _tested(
    cells: Sequence[Cells],
    counts: Sequence[Counter[Key]],
    asked: Asked,
    drafts: list[tuple[int, int]] | None,
) -> SampledCheck:
    tests = [pearson(one.law, count) for one, count in zip(cells, counts, strict=True)]
    statistic, freedom = sum(t.statistic for t in tests), sum(t.degrees for t in tests)
    draws = sum(count.total() for count in counts)
    weights = [count.total() / draws for count in counts]
    return SampledCheck(
        prompts=tuple(one.prompt for one in cells),
        draws=draws,
        cells=sum(chance > 0 for one in cells for chance in one.law.values()),
        chi_square=statistic,
        degrees=freedom,
        p=power.p_value(statistic, freedom) if freedom else None,
        total_variation=sum(w * t.variation for w, t in zip(weights, tests, strict=True)),
        noise=sum(w * t.noise for w, t in zip(weights, tests, strict=True)),
        impossible=sum(t.impossible for t in tests),
        detectable=power.detectable(freedom, draws, asked.alpha, asked.power) if freedom else None,
        touched=None if drafts is None else sum(drafted > 0 for drafted, _ in drafts),
        drafted=None if drafts is None else sum(drafted for drafted, _ in drafts),
        accepted=None if drafts is None else sum(accepted for _, accepted in drafts),
    )


class Pearson(NamedTuple):
    """Counts of one prompt against its law."""

    statistic: float
    degrees: int
    variation: float
    noise: float
    impossible: int


def pearson(law: Mapping[Key, float], counts: Counter[Key]) -> Pearson:
    """Chi-square over the pooled cells, total variation over all of them."""
    draws = counts.total()
    statistic = 0.0
    pools = _pooled(law, draws)
    for pool in pools:
        expected = draws * sum(law[key] for key in pool)
        statistic += (sum(counts[key] for key in pool) - expected) ** 2 / expected
    seen = set(counts) | set(law)
    variation = sum(abs(counts[key] / draws - law.get(key, 0.0)) for key in seen) / 2
    # The mean absolute deviation of a frequency is its standard deviation times sqrt(2/pi) (normal).
    spread = sum(math.sqrt(chance * (1 - chance) / draws) for chance in law.values())
    return Pearson(
        statistic=statistic,
        degrees=len(pools) - 1,
        variation=variation,
        noise=math.sqrt(2 / math.pi) * spread / 2,
        impossible=sum(count for key, count in counts.items() if not law.get(key)),
    )


def _pooled(law: Mapping[Key, float], draws: float) -> list[list[Key]]:
    """Cells of the test: each expects at least `RARE` draws, unless all together are too few."""
    common = [[key] for key, chance in law.items() if chance * draws >= RARE]
    rare = [key for key, chance in law.items() if 0 < chance * draws < RARE]
    if not rare:
        return common
    if common and sum(law[key] for key in rare) * draws < RARE:
        # A pool that is rare itself goes with the least likely of the others.
        rare += common.pop(min(range(len(common)), key=lambda place: law[common[place][0]]))
    return [*common, rare]
