"""What the cross-check rows share: transformers' own loop inside our records.

They answer two questions about ours: are the tokens the same, and how fast is the loop that comes
with the library. They are greedy, one row at a time, and take nothing but the model's weights from
the stack: cache, step and mode are transformers' own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compresskit.decode import check_request
from compresskit.errors import InputError
from compresskit.system import Chunk
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from compresskit.hf.assisted import Burst
    from compresskit.system import Request, System

EFFECTS = Effects(
    # OWN_CACHE and OWN_LOOP go where a method has put something in place of them that would be
    # passed over here in silence.
    requires=frozenset(
        {
            Trait.MODULES,
            Trait.OWN_CACHE,
            Trait.OWN_LOOP,
            Trait.TRAINED,
            Trait.DENSE_CACHE,
            Trait.FULL_CONTEXT,
            Trait.ROLLBACK,
            Trait.VERBATIM_PROMPT,
        }
    ),
    removes=frozenset(
        {Trait.OWN_LOOP, Trait.OWN_CACHE, Trait.BATCH, Trait.PADDED_BATCH, Trait.STATIC_SHAPES}
    ),
)


def single(system: System, request: Request, name: str) -> Request:
    """Return `request` if transformers can decode it as we would.

    Raises:
        InputError: it has several rows, or is sampled.
    """
    tokens = check_request(system, request)
    if len(tokens) > 1:
        raise InputError(
            f"{name} runs transformers' assisted generation, which takes one row, not {len(tokens)}. "
            "Use batch size 1."
        )
    if request.sampling.temperature > 0:
        raise InputError(
            f"{name} is greedy: transformers draws drafts with filters and random numbers of its "
            "own, so a sampled request would not be the one that was asked for. Set temperature 0."
        )
    return replace(request, tokens=tokens)


def chunks(found: Iterable[Burst], device: torch.device) -> Iterator[Chunk]:
    """What transformers delivers, as the chunks of our loops."""
    for burst in found:
        yield Chunk(
            torch.tensor([burst.tokens], device=device),
            torch.tensor([len(burst.tokens)], device=device),
            ((burst.drafted, burst.accepted),),
        )
