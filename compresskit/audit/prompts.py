"""Prompts on which a bias would show: the model is uncertain, and drafts are likely.

A model that is certain says the same whatever a loop does wrong; and a loop that never drafts does
nothing wrong either. Candidates are pieces of natural text; each is worth the entropy of the next
token, as far as the cells tell tokens apart, times the chance that it stands in the prompt already,
which is where lookups find a draft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit import workload
from compresskit.audit.cells import branches
from compresskit.sampling import probabilities
from compresskit.spec import WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.audit.document import Asked
    from compresskit.system import System

CANDIDATES = 64
SAMPLED = 2
"""Prompts that the rows of a batch take turns at. Rows that change places need two of them; more would
leave fewer draws, and so fewer cells, to each."""
SHORTER = (0, 3, 1, 2)
"""Tokens by which prompts of one batch are shorter than the longest, in turn."""


def candidates(system: System, asked: Asked, count: int) -> list[list[int]]:
    """Pieces of the embedded text, `asked.prompt_tokens` long."""
    wanted = WorkloadSpec(prompt_tokens=asked.prompt_tokens)
    return workload.prompts(system.tokenizer, wanted, count, asked.seed).ids


@torch.inference_mode()
def uncertain(
    plain: System, pieces: Sequence[Sequence[int]], asked: Asked, count: int
) -> list[list[int]]:
    """The `count` best of `pieces` (of equal lengths), best first."""
    texts = torch.tensor([list(piece) for piece in pieces], device=plain.device.torch)
    with plain.attached():
        logits = plain.step(texts, plain.new_cache(texts.shape[1]))[:, -1]
    p = probabilities(logits, asked.sampling)
    top = p.topk(min(branches(asked.depth), p.shape[-1])).values
    told = torch.cat((top, (1 - top.sum(-1, keepdim=True)).clamp(min=0)), -1)
    entropy = -torch.xlogy(told, told).sum(-1)
    seen = torch.zeros_like(p).scatter(1, texts, 1.0)
    worth = entropy * (p * seen).sum(-1)
    best = worth.argsort(descending=True)[:count].tolist()
    return [list(pieces[index]) for index in best]


def ragged(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Cut the beginnings off, so that the rows of a batch have different lengths."""
    return [list(prompt[SHORTER[row % len(SHORTER)] :]) for row, prompt in enumerate(prompts)]
