"""What the student is worth on text that it never learns from.

Each look scores the same rows through the same lesson as the training does, with two terms that are
always the same whatever is trained on: the likelihood of the text and the divergence from the teacher.
What the teacher says of these rows is asked once and kept as hidden states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.distill.batch import Batch, Dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.distill.data import Rows
    from compresskit.distill.lesson import Lesson
    from compresskit.distill.narrowed import Narrowed
    from compresskit.distill.teachers.online import Online


class Score(NamedTuple):
    """Nats per token."""

    nll: float
    kl: float
    """From the teacher, or from what a narrowed one says of the student's tokens."""


class HeldOut:
    """The held-out rows of one process, with the teacher's opinion of them."""

    def __init__(
        self,
        rows: Rows,
        teacher: Online | Narrowed,
        *,
        batch: int,
        device: torch.device,
        share: slice,
    ) -> None:
        """Ask the teacher; `share` says which of the rows are this process's."""
        numbers = torch.arange(len(rows))[share]
        self._batches = [rows.pick(part) for part in torch.split(numbers, batch)]
        self._device = device
        self._head = teacher.head
        self._hidden = [
            teacher.targets(one_on(part, device)).hidden.to("cpu") for part in self._batches
        ]

    def look(
        self, lesson: Lesson, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
    ) -> Score:
        """Score the student of `lesson`, whose terms have to be `ce` and `forward_kl`.

        reduce: adds a tensor up over all processes.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        trained = lesson.training
        lesson.eval()
        with torch.no_grad():
            for batch, target in self._asked():
                said = lesson(batch.tokens, batch.weights, target)
                parts = [said.parts["ce"], said.parts["forward_kl"], said.weight]
                sums += torch.stack([part.detach().double().cpu() for part in parts])
        lesson.train(trained)
        nll, kl, weight = reduce(sums).tolist()
        return Score(nll / weight, kl / weight)

    def _asked(self) -> Iterator[tuple[Batch, Dense]]:
        for batch, hidden in zip(self._batches, self._hidden, strict=True):
            here = one_on(batch, self._device)
            yield here, Dense(hidden.to(self._device), self._head, {})


def one_on(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return Batch(batch.tokens.to(device), batch.weights.to(device), batch.rows)
