"""What speculation should bring on this machine, from its own parts, beside what it brought.

    time(step) = T(1) · (d·c + v(d + 1) + h)       d    tokens drafted in it, of the longest row
    tokens(step) = E(d)                            E    from the conditional acceptance by place, of
                                                        the steps that drafted d tokens
    predicted    = sum of tokens / sum of time

with T(1) and v from the probe of passes (`Setup.step_costs`), c and h from the parts of the steps of
the latency pass. The steps are those that were taken: a drafter that abstains has many of d = 0. Where
all have one length this is the S of `stats.speculation`. The difference between prediction and
measurement is what passes in real decoding cost more than in the probe, and what the parts of one
step have to do with each other. Drafters draft longer where they are surer, hence acceptance by length.

All of it is a model, so every number here is an estimate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit.metrics.acceptance import verifications
from compresskit.metrics.core import Metric, stored
from compresskit.metrics.formulae import Timed
from compresskit.metrics.speculation import (
    has_parts,
    host_s,
    missing_steps,
    of_record,
    part_s,
)
from compresskit.metrics.speed import latency
from compresskit.record import Estimated, Unavailable
from compresskit.stats import mean, median
from compresskit.stats.speculation import Costs, best_length, expected_tokens
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from compresskit.record import Reading, Record, StepCosts

ALIKE = 2
"""Times that the probed cache may be longer or shorter than the prompts: a pass costs by its length."""
NO_PROBE = "what passes of several tokens cost was not measured; run it again"


class Model(NamedTuple):
    """The cost model of one record, filled in."""

    costs: Costs
    """In steps of one token."""
    step: float
    """T(1): seconds of a pass over one token."""
    acceptance: list[float]
    """Conditional, by place, as far as any draft got."""
    speed_up: float
    """Over a pass per token, as predicted for the steps that were taken."""

    def tpot(self) -> float:
        """Predicted seconds per token."""
        return self.step / self.speed_up

    def best(self) -> int:
        """The draft length of the largest speed-up, among those whose acceptance is known."""
        return best_length(self.acceptance, self.costs)


def passes_of(found: StepCosts) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Seconds of a pass over one token, and the cost of each width in such passes.

    Medians, net of the time in which another process had the CPU.
    """
    waits = found.waited or tuple((0.0,) * len(spent) for spent in found.seconds)
    net = [
        median([max(spent - wait, 0.0) for spent, wait in zip(all_, queued, strict=True)])
        for all_, queued in zip(found.seconds, waits, strict=True)
    ]
    one = net[found.widths.index(1)]
    return one, tuple((w, seconds / one) for w, seconds in zip(found.widths, net, strict=True))


def costs_of(found: StepCosts, taken: Sequence[Timed] | None = None) -> Costs:
    """The costs of steps, in passes over one token.

    `taken`: repetitions that tell what drafting and the host cost; None: the probe's own trial. Where
    nothing was drafted, whatever the drafter cost counts for the host.
    """
    step, passes = passes_of(found)
    trial = [] if found.trial is None else [Timed(found.trial, found.batch, found.tokens_in_cache)]
    timed = [one for one in (trial if taken is None else taken) if _parts(one)]
    drafting = any(map(_longest, timed))
    # Medians over repetitions: one that another process has cut into counts once.
    draft = [part_s(one, "draft") / _longest(one) for one in timed if _longest(one)]
    host = [
        (host_s(one) + (0.0 if drafting else part_s(one, "draft"))) / (one.chunks - 1)
        for one in timed
    ]
    return Costs(
        passes=passes,
        draft=median(draft) / step if draft else 0.0,
        host=max(median(host), 0.0) / step if host else 0.0,
        padded=found.padded,
    )


def _parts(one: Timed) -> bool:
    return bool(one.sample.parts and one.chunks > 1)


def _longest(one: Timed) -> int:
    """Tokens drafted, of the longest row of each pass."""
    return sum(max(step.drafted for step in rows) for rows in verifications(one) or ())


def model(record: Record) -> Model | Unavailable:
    """Fill the model in from `record`."""
    found = of_record(record)
    if found is None:
        return missing_steps(record)
    taken = [one for one in latency(record) if has_parts(one)]
    if not taken:
        return missing_steps(record)
    probed = None if record.setup is None else record.setup.step_costs
    if probed is None:
        return Unavailable(reason=NO_PROBE)
    asked = mean([one.prompt_tokens for one in taken])
    if not 1 / ALIKE <= probed.tokens_in_cache / asked <= ALIKE:
        return Unavailable(
            reason=f"passes were timed on {probed.tokens_in_cache} tokens, the prompts have {asked:.0f}"
        )
    known = [rate for rate in found.conditional() if rate is not None]
    costs = costs_of(probed, taken)
    expected = {
        length: expected_tokens([rate for rate in rates if rate is not None])
        for length, rates in found.by_length().items()
    }
    tokens = time = 0.0
    for one in taken:
        for rows in verifications(one) or ():
            tokens += mean([expected.get(step.drafted, 1.0) for step in rows])
            time += costs.step(max(step.drafted for step in rows))
    return Model(costs, passes_of(probed)[0], known, tokens / time)


def _estimate(
    name: str, unit: Unit, definition: str, how: str, read: Callable[[Model], float]
) -> Metric:
    def value(record: Record) -> Reading:
        found = model(record)
        if isinstance(found, Unavailable):
            return found
        return Estimated(value=read(found), unit=unit, model=how)

    return stored(name, unit, "none", definition, value)


_HOW = "acceptance by place, probed passes, measured parts of the steps"
SPEEDUP: tuple[Metric, ...] = (
    _estimate(
        "speedup_predicted",
        Unit.RATIO,
        "speedup_predicted/1: tokens over time of the steps taken, by the cost model; over one pass "
        "per token.",
        _HOW,
        lambda found: found.speed_up,
    ),
    _estimate(
        "tpot_predicted_s",
        Unit.SECOND,
        "tpot_predicted/1: a pass over one token / speedup_predicted; beside tpot_s.",
        _HOW,
        lambda found: found.tpot(),
    ),
    _estimate(
        "best_draft_length",
        Unit.TOKEN,
        "best_draft_length/1: the length of the largest S(k), up to the longest whose acceptance is "
        "known; 0: no draft is worth its pass.",
        _HOW,
        lambda found: found.best(),
    ),
    _estimate(
        "draft_cost",
        Unit.RATIO,
        "draft_cost/1: c, seconds per drafted token over those of a pass over one token.",
        "draft parts of the latency pass, probed pass",
        lambda found: found.costs.draft,
    ),
    _estimate(
        "host_cost",
        Unit.RATIO,
        "host_cost/1: h, host_s over the seconds of a pass over one token.",
        "steps less their parts, probed pass",
        lambda found: found.costs.host,
    ),
    _estimate(
        "verify_cost",
        Unit.RATIO,
        "verify_cost/1: v, a pass over the longest draft and its root, in passes over one token.",
        "probed passes",
        lambda found: found.costs.passes[-1][1],
    ),
)
