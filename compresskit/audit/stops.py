"""Answers end where plain decoding ends, though the end lies inside a block.

A loop that emits several tokens at once may run over a stop token or over the length asked for.
Stop tokens are taken from what plain decoding says, one at each place of the answer in turn; lengths
are all of the first few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.audit.answer import request_of
from compresskit.audit.document import StopCheck
from compresskit.spec import SamplingSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.audit.answer import Answer
    from compresskit.system import System

PLACES = 8
"""Stop tokens are taken from so many places, and so many lengths are asked for."""
_SHOWN = 4


def stops(
    answer: Answer,
    plain: System,
    reference: Answer,
    prompts: Sequence[Sequence[int]],
    *,
    new: int,
    exact: bool,
) -> StopCheck:
    """Try stop tokens and lengths on `prompts`, all rows together.

    exact: tokens must equal the plain ones, as in float32; otherwise it is enough that an answer
    ends with its first stop token or at the length.
    """
    device = plain.device.torch
    said = reference(request_of(prompts, new, SamplingSpec(), device), new).rows
    wrong: list[str] = []
    answers, inside = 0, 0
    told = True
    for place in range(1, PLACES + 1):
        at = place * new // (PLACES + 1)
        stop = tuple(sorted({row[at] for row in said}))
        for ends, length in ((stop, new), ((), place)):
            request = request_of(prompts, length, SamplingSpec(), device, stop=ends)
            answered, plainly = answer(request, length), reference(request, length)
            told = told and answered.ended_in_draft is not None
            inside += sum(answered.ended_in_draft or ())
            for row, (mine, theirs) in enumerate(zip(answered.rows, plainly.rows, strict=True)):
                answers += 1
                if (mine != theirs) if exact else not _ends(mine, ends, length):
                    wrong.append(
                        f"prompt {row}, stop {list(ends)}, at most {length}: {len(mine)} tokens "
                        f"where plain decoding gives {len(theirs)}"
                    )
    return StopCheck(answers=answers, inside=inside if told else None, wrong=tuple(wrong[:_SHOWN]))


def _ends(row: Sequence[int], stop: Sequence[int], length: int) -> bool:
    """Whether an answer ends with its first stop token, or has the length asked for."""
    if any(token in stop for token in row[:-1]) or not row:
        return False
    return row[-1] in stop or len(row) == length
