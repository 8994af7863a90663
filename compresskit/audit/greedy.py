"""Greedy answers beside plain decoding's, by the same step.

In float32 they must be equal. In bfloat16 and float16 a pass over several tokens rounds otherwise
than a pass over one, and two nearly tied tokens may change places: an answer may leave the plain one
where the plain model's logits of the two tokens are closer than

    2 · eps · largest |logit|        eps of the type: 2^-7 for bfloat16, 2^-10 for float16

which is what rounding the two logits alone can do, and as much again for the layers below. A wider
gap is a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit.audit.answer import Answered, request_of
from compresskit.audit.document import Divergence, GreedyCheck
from compresskit.quality.greedy import first_divergence
from compresskit.spec import SamplingSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.audit.answer import Answer
    from compresskit.system import System


def greedy(
    answer: Answer,
    plain: System,
    reference: Answer,
    prompts: Sequence[Sequence[int]],
    *,
    new: int,
    batch: int,
) -> tuple[GreedyCheck, list[int]]:
    """Compare `answer` with `reference`, the plain loop of `plain`, in batches of prompts.

    Returns also the prompts' numbers, those first in whose answers most drafts were accepted.
    """
    ours, theirs = (_answers(one, plain, prompts, new, batch) for one in (answer, reference))
    parted = [
        _divergence(plain, prompts[index], index, mine, plainly, place)
        for index, (mine, plainly) in enumerate(zip(ours.rows, theirs.rows, strict=True))
        if (place := first_divergence(mine, plainly)) is not None
    ]
    drafts = ours.drafts
    found = GreedyCheck(
        prompts=len(prompts),
        new_tokens=new,
        equal=len(prompts) - len(parted),
        divergences=tuple(parted),
        drafted=None if drafts is None else sum(drafted for drafted, _ in drafts),
        accepted=None if drafts is None else sum(accepted for _, accepted in drafts),
    )
    busiest = list(range(len(prompts)))
    if drafts is not None:
        busiest.sort(key=lambda row: -drafts[row][1])
    return found, busiest


def _answers(
    answer: Answer, plain: System, prompts: Sequence[Sequence[int]], new: int, batch: int
) -> Answered:
    """All answers, in batches of one size: the last one is filled up with the first prompts."""
    rows: list[list[int]] = []
    drafts: list[tuple[int, int]] | None = []
    for start in range(0, len(prompts), batch):
        part = [prompts[place % len(prompts)] for place in range(start, start + batch)]
        one = answer(request_of(part, new, SamplingSpec(), plain.device.torch), new)
        rows += one.rows
        drafts = None if drafts is None or one.drafts is None else drafts + one.drafts
    count = len(prompts)
    return Answered(rows[:count], None if drafts is None else drafts[:count])


@torch.inference_mode()
def _divergence(
    plain: System,
    prompt: Sequence[int],
    index: int,
    ours: Sequence[int],
    theirs: Sequence[int],
    place: int,
) -> Divergence:
    text = torch.tensor([[*prompt, *theirs[:place]]], device=plain.device.torch)
    with plain.attached():
        raw = plain.step(text, plain.new_cache(text.shape[1]))[0, -1]
    logits = raw.float()
    first, second = logits.topk(2).values.tolist()
    bound = 2 * torch.finfo(raw.dtype).eps * float(logits.abs().max())
    # Where one answer is merely shorter, no two tokens can be tied.
    both = place < min(len(ours), len(theirs))
    gap = abs(float(logits[theirs[place]] - logits[ours[place]])) if both else first - second
    tied = both and raw.dtype != torch.float32 and gap < bound
    return Divergence(
        prompt=index,
        token=place,
        margin=first - second,
        gap=gap,
        bound=bound,
        kind="numeric_tie" if tied else "bug",
    )
