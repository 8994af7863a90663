"""The speculative loop: draft, verify in one forward pass, take back what was rejected.

    last token + draft ──► step ──► k + 1 rows of logits ──► verdict ──► emit
                             │                                  │
                           cache ◄──────── roll back ───────────┘

Before each pass the cache holds every emitted token but the last. Without a draft the pass is
the plain step of `compresskit.decode`. One sequence at a time: rows that accept different lengths
would need their positions and masks apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from compresskit.decode import check_request
from compresskit.errors import InputError
from compresskit.hf.cache import enable_rollback, roll_back
from compresskit.methods.speculative._verify import Draft, verify
from compresskit.sampling import generator_for
from compresskit.system import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.system import Request, System


class Drafter(Protocol):
    """Guesses how the text goes on; made anew for each request."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Learn the next tokens of the text: first the prompt, then each step's."""

    def draft(self, limit: int) -> Draft:
        """Guess at most `limit` tokens; none is a fine answer."""


@torch.inference_mode()
def speculate(system: System, request: Request, drafter: Drafter) -> Iterator[Chunk]:
    """Decode `request`: greedy tokens equal plain decoding's, sampled ones follow its law."""
    tokens = check_request(system, request)
    if tokens.shape[0] != 1 or (request.mask is not None and not bool(request.mask.all())):
        raise InputError(
            "speculative decoding takes one sequence without padding; use batch size 1."
        )
    device, prompt = tokens.device, tokens[0].tolist()
    cache = system.new_cache(len(prompt) + request.max_new_tokens)
    generator = generator_for(request.seed, device, request.sampling)
    logits = system.step(tokens, cache)
    # While the device works on the prompt, the host reads it.
    drafter.observe(prompt)
    enable_rollback(cache)
    draft = Draft([])
    left = request.max_new_tokens
    while True:
        verdict = verify(logits[0], draft, request.sampling, generator)
        emitted = _until_stop(verdict.tokens, request.stop)
        left -= len(emitted)
        yield Chunk(
            torch.tensor([emitted], device=device),
            torch.tensor([len(emitted)], device=device),
            drafted=len(draft.tokens),
            accepted=min(verdict.accepted, len(emitted)),
        )
        if left == 0 or emitted[-1] in request.stop:
            return
        roll_back(cache, len(draft.tokens) - verdict.accepted)
        drafter.observe(emitted)
        # The model adds a token of its own to whatever it accepts, so one place stays free.
        draft = drafter.draft(left - 1) if left > 1 else Draft([])
        block = torch.tensor([[emitted[-1], *draft.tokens]], device=device)
        logits = system.step(block, cache, keep=block.shape[-1])


def _until_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    """Return `tokens` up to and with the first one in `stop`."""
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[: place + 1]
    return tokens
