"""A teacher for a student that knows fewer tokens: the same text in the teacher's numbers.

    student's row    5  17  3      token ids of the smaller vocabulary
    teacher reads  104 9020 77     the same tokens by the teacher's ids
    teacher says   p over all V ──► p over the student's tokens, renormalised

Text in a smaller vocabulary is cut into more tokens than the teacher is used to, all of which it
knows. What it gives to tokens that the student does not have is left out, so this is a divergence
from the teacher among the student's tokens and not from the teacher: it teaches, and is not reported as
the distance from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import nn

from compresskit.distill.batch import Batch, Dense
from compresskit.errors import SpecError

if TYPE_CHECKING:
    from compresskit.distill.teachers.online import Online


def ids_in(teacher: Any, student: Any, size: int) -> torch.Tensor:
    """The teacher's id, int64 `[size]`, of each of the student's tokens; both are transformers tokenizers.

    Raises:
        SpecError: the student has tokens that its teacher does not know.
    """
    theirs = teacher.get_vocab()
    mine = student.get_vocab()
    foreign = sorted(token for token in mine if token not in theirs)
    if foreign or set(mine.values()) != set(range(size)):
        raise SpecError(
            f"the student has tokens that its teacher does not know ({len(foreign)} of {size}"
            f"{': ' + repr(foreign[0]) if foreign else ''}), so it cannot learn from it what comes next. "
            "Make the student of this teacher, with makers that keep its tokens."
        )
    found = torch.empty(size, dtype=torch.int64)
    for token, place in mine.items():
        found[place] = theirs[token]
    return found


class _Head(nn.Module):
    """Logits of some of the teacher's tokens."""

    def __init__(self, head: nn.Module, ids: torch.Tensor) -> None:
        super().__init__()
        self.head, self.ids = head, ids

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, E]` to `[n, student's V]`."""
        logits: torch.Tensor = self.head(hidden)
        return logits[..., self.ids]


@final
class Narrowed:
    """An online teacher that is asked in the student's tokens."""

    kind: Literal["dense"] = "dense"

    def __init__(self, teacher: Online, ids: torch.Tensor) -> None:
        """Ask `teacher`; `ids` says its id of each of the student's tokens."""
        self.inner = teacher
        self.ids = ids.to(teacher.model.device)
        self.head = _Head(teacher.head, self.ids)

    @property
    def tokens_read(self) -> int:
        """Tokens that the model has read."""
        return self.inner.tokens_read

    def targets(self, batch: Batch) -> Dense:
        """What it says, over the student's tokens."""
        said = self.inner.targets(Batch(self.ids[batch.tokens], batch.weights, batch.rows))
        return Dense(said.hidden, self.head, said.states)
