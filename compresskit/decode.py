"""The autoregressive loop: one token per row and step.

    prompt ──► prefill ──► token ──► step ──► token ──► ...
                 │                     │
               cache ───────────────► cache

The loop is a generator of `Chunk`s and knows no clock: whoever measures wraps `next()`. Rows of
different lengths are left-padded; a row that meets a stop token goes on in the rectangle but
delivers nothing more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit.errors import InputError
from compresskit.sampling import draw, generator_for
from compresskit.system import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.system import Request, System


def check_request(system: System, request: Request) -> torch.Tensor:
    """Return the prompt as the model will see it, or raise `InputError` if it cannot be decoded."""
    if request.tokens.shape[-1] == 0:
        raise InputError("the prompt is empty: give at least one token.")
    if request.max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {request.max_new_tokens}.")
    tokens = system.prompt(request.tokens)
    total = tokens.shape[-1] + request.max_new_tokens
    if total > system.context:
        raise InputError(
            f"prompt of {tokens.shape[-1]} tokens plus {request.max_new_tokens} new ones is {total}, "
            f"more than the model's context of {system.context}. Shorten the prompt or ask for fewer tokens."
        )
    return tokens


def pad(rows: list[list[int]], *, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Left-pad `rows` to int64 `[B, S]` with a bool mask, or None as mask when lengths are equal."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = True
    return tokens.to(device), None if bool(mask.all()) else mask.to(device)


@torch.inference_mode()
def autoregressive(system: System, request: Request) -> Iterator[Chunk]:
    """Decode `request` one token at a time."""
    tokens = check_request(system, request)
    batch, width = tokens.shape
    cache = system.new_cache(width + request.max_new_tokens)
    generator = generator_for(request.seed, tokens.device, request.sampling)
    one = torch.ones(batch, dtype=torch.long, device=tokens.device)
    stop = torch.tensor(request.stop, device=tokens.device) if request.stop else None
    mask, positions = request.mask, None
    if mask is not None:
        # Left padding: each row counts its own positions; padding slots are masked, their value is free.
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    alive = one
    logits = system.step(tokens, cache, mask=mask, positions=positions)
    for emitted in range(1, request.max_new_tokens + 1):
        token = draw(logits[:, -1], request.sampling, generator)
        yield Chunk(token.unsqueeze(-1), alive)
        if stop is not None:
            alive = alive * (~torch.isin(token, stop)).long()
            if not alive.any():
                return
        if emitted == request.max_new_tokens:
            return
        if mask is not None and positions is not None:
            mask = torch.cat((mask, one.bool().unsqueeze(-1)), dim=-1)
            positions = positions[:, -1:] + 1
        logits = system.step(token.unsqueeze(-1), cache, mask=mask, positions=positions)
