"""How much of what was drafted was accepted: counts and rates over the single steps.

A step is one row in one verification. Names and definitions are those that vLLM gives per request
(`metrics.speculative_decoding`, vllm-project/vllm#48915), where it has any: a speculative step is one
with at least one drafted token, and the model's own token is never among the accepted ones.

Of the place p in a draft (from 0) there are three rates, which only agree for drafts of one length:

    unconditional   accepted beyond p / all speculative steps              vLLM's; its sum + 1 is the
                                                                           mean acceptance length
    offered         accepted beyond p / steps that drafted beyond p        abstaining is not failing
    conditional     accepted beyond p / steps that drafted beyond p        what a cost model needs
                                        and accepted all before p

In a tree a place is a depth. How deep each one was is not kept: it counts as deep as its tokens would
be in a row, and no deeper than the draft length asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from compresskit.metrics.formulae import Timed
    from compresskit.record import Record


class Step(NamedTuple):
    """One row in one verification."""

    drafted: int
    accepted: int


class Acceptance(NamedTuple):
    """The steps that drafted something, of one or several requests."""

    steps: tuple[Step, ...]
    most: int
    """The longest draft that was asked for: the `num_spec_tokens` of vLLM."""

    @property
    def drafted(self) -> int:
        """num_draft_tokens."""
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        """num_accepted_draft_tokens."""
        return sum(step.accepted for step in self.steps)

    def mean_length(self) -> float | None:
        """mean_acceptance_length: 1 + accepted / steps, in [1, most + 1]; None without a step."""
        return 1 + self.accepted / len(self.steps) if self.steps else None

    def rate(self) -> float | None:
        """draft_acceptance_rate: accepted / drafted; None without a step."""
        return self.accepted / self.drafted if self.steps else None

    def histogram(self) -> list[int]:
        """acceptance_histogram: steps that accepted 0, 1, ..., `most` tokens."""
        counts = [0] * (self.most + 1)
        for step in self.steps:
            counts[step.accepted] += 1
        return counts

    def per_position(self) -> list[int]:
        """How many steps accepted the token at each place."""
        histogram = self.histogram()
        return [sum(histogram[place + 1 :]) for place in range(self.most)]

    def unconditional(self) -> list[float | None]:
        """Per place: share of all speculative steps that accepted it."""
        return self._rates(lambda step, place: True)

    def offered(self) -> list[float | None]:
        """Per place: share of the steps that drafted a token there."""
        return self._rates(lambda step, place: step.drafted > place)

    def conditional(self) -> list[float | None]:
        """Per place: share of the steps that drafted a token there and accepted all before it."""
        return self._rates(lambda step, place: step.drafted > place <= step.accepted)

    def by_length(self) -> dict[int, list[float | None]]:
        """Conditional rates of the steps that drafted 1, 2, ... tokens, apart."""
        return {
            length: Acceptance(
                tuple(step for step in self.steps if step.drafted == length),
                min(length, self.most),
            ).conditional()
            for length in sorted({step.drafted for step in self.steps})
        }

    def _rates(self, counts: Callable[[Step, int], bool]) -> list[float | None]:
        """Accepted over counted steps; None for a place where no step counts."""
        rates: list[float | None] = []
        for place in range(self.most):
            counted = [step for step in self.steps if counts(step, place)]
            hits = sum(step.accepted > place for step in counted)
            rates.append(hits / len(counted) if counted else None)
        return rates


def verifications(one: Timed) -> list[tuple[Step, ...]] | None:
    """The passes of a repetition that verified something or drafted nothing, rows side by side.

    The prefill is not among them, unless its pass had drafts to verify as well. None where the
    record was made before steps were kept, or the loop does not speculate.
    """
    drafted, accepted = one.sample.per_step_drafted, one.sample.per_step_accepted
    if drafted is None or accepted is None:
        return None
    passes: list[tuple[Step, ...]] = []
    for index in range(max(map(len, drafted), default=0)):
        steps = tuple(
            Step(d[index], a[index])
            for d, a in zip(drafted, accepted, strict=True)
            if index < len(d)
        )
        if index or any(step.drafted for step in steps):
            passes.append(steps)
    return passes


def acceptance(taken: Iterable[Timed], most: int | None = None) -> Acceptance | None:
    """Put the steps of several repetitions together; None where none were kept.

    `most` None: the longest draft that occurred.
    """
    found = [passes for one in taken if (passes := verifications(one)) is not None]
    if not found:
        return None
    steps = tuple(step for passes in found for rows in passes for step in rows if step.drafted > 0)
    longest = max((step.drafted for step in steps), default=0)
    return Acceptance(steps, longest if most is None else most)


def asked_length(record: Record) -> int | None:
    """The draft length that the stack asked for; None where no method has one."""
    for method in record.spec.stack:
        length = method.params.get("draft")
        if isinstance(length, int) and method.name.startswith("speculative/"):
            return length
    return None
