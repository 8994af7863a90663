"""What is audited: something that answers a request.

    answer(request, enough) ──► tokens of each row, and what was drafted for them

`loop` makes it of a system. Another library's sampler is a function of the same form; it need not
tell of drafts.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple, Protocol

from compresskit.decode import pad
from compresskit.system import Request

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from typing import Any

    import torch

    from compresskit.spec import SamplingSpec
    from compresskit.system import System


class Answered(NamedTuple):
    """Tokens of each row, and (drafted, accepted) of each row; `ended_in_draft`: its last step had one.

    Both are None where the loop does not tell.
    """

    rows: list[list[int]]
    drafts: list[tuple[int, int]] | None = None
    ended_in_draft: list[bool] | None = None


class Answer(Protocol):
    """Decodes a request; may leave off once every row has `enough` tokens."""

    def __call__(self, request: Request, enough: int) -> Answered:
        """Return the new tokens of every row."""


def loop(system: System) -> Answer:
    """Answer by the decode loop of `system`."""

    def answer(request: Request, enough: int) -> Answered:
        rows: list[list[int]] = [[] for _ in request.tokens]
        drafts = [(0, 0) for _ in rows]
        last = [False for _ in rows]
        speculates = False
        chunks: Generator[Any] = system.generate(request)  # type: ignore[assignment]
        with closing(chunks):
            for chunk in chunks:
                for row, (new, length) in enumerate(
                    zip(chunk.tokens.tolist(), chunk.lengths.tolist(), strict=True)
                ):
                    rows[row] += new[:length]
                    if chunk.drafts and length:
                        speculates = True
                        drafted, accepted = chunk.drafts[row]
                        drafts[row] = (drafts[row][0] + drafted, drafts[row][1] + accepted)
                        last[row] = drafted > 0
                if all(len(row) >= enough for row in rows):
                    break
        return Answered(rows, drafts, last) if speculates else Answered(rows)

    return answer


def request_of(
    prompts: Sequence[Sequence[int]],
    new: int,
    sampling: SamplingSpec,
    device: torch.device,
    *,
    stop: tuple[int, ...] = (),
    seed: int = 0,
) -> Request:
    """One batch of prompts, left-padded where their lengths differ."""
    tokens, mask = pad([list(prompt) for prompt in prompts], device=device)
    return Request(tokens, new, sampling, mask=mask, stop=stop, seed=seed)
