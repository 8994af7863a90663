"""The speculative loop: draft, verify in one forward pass, take back what was rejected.

    newest token + draft ──► pass ──► logits after each ──► verdicts ──► emit
                               │                               │
                             cache ◄──── keep what stays ──────┘

Before each pass the cache holds every emitted token but the newest of each row. Where no row has a
draft the pass is the plain step of `compresskit.decode`. Rows of a batch accept different numbers of
tokens; `_rows` keeps them apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit.decode import check_request
from compresskit.methods.speculative._draft import NOTHING, ROOT, Draft, Evidence
from compresskit.methods.speculative._rows import Rows
from compresskit.methods.speculative._verify import verify
from compresskit.sampling import generator_for
from compresskit.system import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.methods.speculative._draft import Drafter
    from compresskit.methods.speculative._verify import Judge
    from compresskit.system import Request, System


@torch.inference_mode()
def speculate(
    system: System, request: Request, drafter: Drafter, judge: Judge = verify
) -> Iterator[Chunk]:
    """Decode `request`: greedy tokens equal plain decoding's, sampled ones follow its law.

    Unless `judge` is another than `verify`.
    """
    tokens = check_request(system, request)
    batch, width = tokens.shape
    mask = None if request.mask is None or bool(request.mask.all()) else request.mask
    generator = generator_for(request.seed, tokens.device, request.sampling)
    rows = Rows(system, width + request.max_new_tokens)
    features: list[torch.Tensor] | None = [] if drafter.wants_features else None
    logits = rows.begin(tokens, mask, features)
    # While the device works on the prompt, the host reads it.
    prompts = _texts(tokens, mask)
    drafter.observe(prompts)
    blocks = [[prompt[-1]] for prompt in prompts]
    drafts = [NOTHING] * batch
    left = [request.max_new_tokens] * batch
    while True:
        with system.during("judge"):
            verdicts = judge(logits, drafts, request.sampling, generator)
            emitted = [
                _until_stop(verdict.tokens[: max(left[row], 0)], request.stop)
                for row, verdict in enumerate(verdicts)
            ]
            left = [
                0 if not new or new[-1] in request.stop else rest - len(new)
                for rest, new in zip(left, emitted, strict=True)
            ]
        yield Chunk(
            *_rectangle(emitted, tokens.device),
            tuple(
                (len(draft.tokens), min(verdict.accepted, len(new)))
                for draft, verdict, new in zip(drafts, verdicts, emitted, strict=True)
            ),
        )
        if not any(left):
            return
        # A row that has ended goes on in the rectangle, and nothing of it is kept.
        kept = [
            [0, *(place + 1 for place in verdict.path)] if rest else []
            for verdict, rest in zip(verdicts, left, strict=True)
        ]
        if rows.block:
            rows.keep(kept)
        with system.during("draft"):
            seen = Evidence(blocks, logits, kept, features.pop() if features else None)
            drafter.observe(emitted, seen)
            # The model adds a token of its own to whatever it accepts, so one place stays free.
            drafts = drafter.draft([rest - 1 for rest in left])
        newest = [new[-1] if new else block[0] for new, block in zip(emitted, blocks, strict=True)]
        todo = [_block(token, draft) for token, draft in zip(newest, drafts, strict=True)]
        blocks = [block.tokens for block in todo]
        with system.during("verify"):
            logits = rows.extend(todo, features)


def _block(newest: int, draft: Draft) -> Draft:
    """The tokens of one pass: the newest of the text, and the draft behind it."""
    parents = None
    if draft.parents is not None:
        parents = [ROOT, *(parent + 1 for parent in draft.parents)]
    return Draft([newest, *draft.tokens], parents=parents)


def _texts(tokens: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts without their padding."""
    ids: list[list[int]] = tokens.tolist()
    if mask is None:
        return ids
    return [
        [token for token, real in zip(row, kept, strict=True) if real]
        for row, kept in zip(ids, mask.tolist(), strict=True)
    ]


def _rectangle(
    emitted: Sequence[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[B, n]`, padded with zeros at the end, and how many are real in each row `[B]`."""
    longest = max(map(len, emitted))
    padded = [new + [0] * (longest - len(new)) for new in emitted]
    lengths = torch.tensor([len(new) for new in emitted], device=device)
    return torch.tensor(padded, device=device), lengths


def _until_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    """Return `tokens` up to and with the first one in `stop`."""
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[: place + 1]
    return tokens
