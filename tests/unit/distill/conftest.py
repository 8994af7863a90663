"""Places with a student and a teacher of different widths, small enough for float64 and differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from compresskit.distill.batch import Dense, Draws, TopK
from compresskit.distill.losses.chunked import Places
from compresskit.hf.head import Head, Shape

PLACES, VOCABULARY, STUDENT, TEACHER, KEPT = 7, 11, 4, 6, 3


@dataclass
class Room:
    """Hidden states, heads and all three kinds of target, float64."""

    hidden: torch.Tensor
    head: Head
    places: Places

    def teacher_logprobs(self) -> torch.Tensor:
        dense: Any = self.places.target
        return dense.head(dense.hidden).detach().log_softmax(-1)

    def with_target(self, kind: str) -> Places:
        return Places(self.places.labels, self.places.weights, self.target(kind))

    def target(self, kind: str) -> Any:
        whole = self.teacher_logprobs()
        if kind == "topk":
            top = whole.topk(KEPT, dim=-1)
            rest = torch.log1p(-top.values.exp().sum(-1))
            return TopK(top.indices, top.values, rest)
        if kind == "draws":
            generator = torch.Generator().manual_seed(5)
            ids = torch.multinomial(whole.exp(), 4, replacement=True, generator=generator)
            weights = torch.full(ids.shape, 0.25, dtype=torch.float64)
            weights[0, 3], weights[0, 2] = 0.0, 0.5  # an unused entry
            return Draws(ids, weights)
        return self.places.target


def room(*, bias: bool = True, shape: Shape = Shape(), seed: int = 0) -> Room:  # noqa: B008  # frozen
    torch.manual_seed(seed)
    head = Head(nn.Linear(STUDENT, VOCABULARY, bias=bias), shape).double()
    teacher = Head(nn.Linear(TEACHER, VOCABULARY), Shape()).double()
    with torch.no_grad():
        for one in (head, teacher):
            one.linear.weight.mul_(3)
    return Room(
        torch.randn(PLACES, STUDENT, dtype=torch.float64, requires_grad=True),
        head,
        Places(
            torch.randint(0, VOCABULARY, (PLACES,)),
            torch.linspace(0.25, 2.0, PLACES, dtype=torch.float64),
            Dense(torch.randn(PLACES, TEACHER, dtype=torch.float64), teacher, {}),
        ),
    )


@pytest.fixture
def make_room() -> Any:
    return room
