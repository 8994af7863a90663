"""What became of the drafts of a request or of many, in integers, and the rates that follow.

A step is a forward pass after the prompt's. Names and rates are those of `metrics.acceptance`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.metrics.acceptance import Acceptance, Step

if TYPE_CHECKING:
    from collections.abc import Iterable


class Steps(NamedTuple):
    """Passes of one request."""

    tokens: int
    """Tokens of the answer; the first came with the prompt."""
    drafts: tuple[tuple[int, int], ...]
    """Tokens drafted and accepted in each pass after the prompt's."""


def total(requests: Iterable[Steps], *, draft: int) -> dict[str, Any]:
    """Counts and rates of `requests` together, under a drafter that drafts at most `draft` tokens.

    Rates of nothing are null.
    """
    requests = list(requests)
    passes = [Step(*step) for request in requests for step in request.drafts]
    found = Acceptance(tuple(step for step in passes if step.drafted), draft)
    tokens = sum(request.tokens for request in requests)
    return {
        "num_requests": len(requests),
        "num_generated_tokens": tokens,
        "num_verify_forwards": len(passes),
        "tokens_per_verify_forward": (tokens - len(requests)) / len(passes) if passes else None,
        "num_spec_tokens": draft,
        "num_spec_steps": len(found.steps),
        "num_draft_tokens": found.drafted,
        "num_accepted_draft_tokens": found.accepted,
        "mean_acceptance_length": found.mean_length(),
        "draft_acceptance_rate": found.rate(),
        "acceptance_histogram": found.histogram(),
        "accepted_per_pos": found.per_position(),
        "acceptance_rate_per_pos_unconditional": found.unconditional(),
        "acceptance_rate_per_pos_offered": found.offered(),
        "acceptance_rate_per_pos_conditional": found.conditional(),
        "per_step_drafted": [step.drafted for step in found.steps],
        "per_step_accepted": [step.accepted for step in found.steps],
    }
