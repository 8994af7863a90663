"""What became of the drafts of a request or of many, in integers, and the rates that follow.

A step is a forward pass after the prompt's. Names are those of vLLM's per-request metrics of
speculative decoding: its steps are only those that had a draft, its lengths count the token that
the model adds itself.

Three rates tell how far drafts hold at a position p, and are easily taken for each other:

    unconditional   accepted at p / all steps with a draft
    offered         accepted at p / steps whose draft reaches p
    conditional     accepted at p / steps whose draft reaches p and held before p
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


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
    passes = [step for request in requests for step in request.drafts]
    steps = [(drafted, accepted) for drafted, accepted in passes if drafted]
    drafted, accepted = (sum(one[i] for one in steps) for i in (0, 1))
    tokens = sum(request.tokens for request in requests)
    return {
        "num_requests": len(requests),
        "num_generated_tokens": tokens,
        "num_verify_forwards": len(passes),
        "tokens_per_verify_forward": _ratio(tokens - len(requests), len(passes)),
        "num_spec_tokens": draft,
        "num_spec_steps": len(steps),
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": accepted,
        "mean_acceptance_length": 1 + accepted / len(steps) if steps else None,
        "draft_acceptance_rate": _ratio(accepted, drafted),
        **by_position(steps, draft=draft),
        "per_step_drafted": [one[0] for one in steps],
        "per_step_accepted": [one[1] for one in steps],
    }


def by_position(steps: Sequence[tuple[int, int]], *, draft: int) -> dict[str, Any]:
    """Histogram of accepted tokens (`draft` + 1 entries), and how many steps accept each position."""
    places = range(draft)
    accepted = [sum(got > place for _, got in steps) for place in places]
    offered = [sum(given > place for given, _ in steps) for place in places]
    reached = [sum(given > place and got >= place for given, got in steps) for place in places]
    return {
        "acceptance_histogram": [sum(got == n for _, got in steps) for n in range(draft + 1)],
        "accepted_per_pos": accepted,
        "acceptance_rate_per_pos_unconditional": [_ratio(n, len(steps)) for n in accepted],
        "acceptance_rate_per_pos_offered": [
            _ratio(n, all_) for n, all_ in zip(accepted, offered, strict=True)
        ],
        "acceptance_rate_per_pos_conditional": [
            _ratio(n, all_) for n, all_ in zip(accepted, reached, strict=True)
        ],
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
