"""What is kept of the teacher's distribution at a place.

    topk:k=64       its likeliest tokens and the mass of the rest: exact where it looks, blind elsewhere
    draws:n=12      tokens drawn from it: noisy at every place, right on average everywhere

To add a format, write one file with one final subclass of `Format` and list it in `cache.parse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from compresskit.distill.losses.term import Kind
from compresskit.spec import Frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compresskit.distill.batch import Draws, TopK

Stored = dict[str, torch.Tensor]
"""What is stored of some places: tensors `[n, ...]` by name."""


class Column(NamedTuple):
    """One tensor of a shard."""

    dtype: torch.dtype
    width: int
    """Numbers a place."""


class Format(Frozen, ABC):
    """One way to store distributions; its fields are its parameters."""

    kind: ClassVar[Kind]
    about: ClassVar[str]
    """What is known of this format's errors, for the reader of a report."""

    @abstractmethod
    def columns(self, vocabulary: int) -> Mapping[str, Column]:
        """What is stored of a place, over a vocabulary of so many tokens.

        Raises:
            SpecError: the parameters do not suit such a vocabulary.
        """

    @abstractmethod
    def uniforms(self) -> int:
        """Random numbers that packing a place takes."""

    @abstractmethod
    def pack(self, logprobs: torch.Tensor, uniforms: torch.Tensor) -> Stored:
        """Reduce float32 `[n, V]` to what is stored.

        uniforms: float64 `[n, uniforms()]` in [0, 1).
        """

    @abstractmethod
    def unpack(self, stored: Mapping[str, torch.Tensor]) -> TopK | Draws:
        """Turn what is stored of n places into a target."""

    @abstractmethod
    def errors(self, logprobs: torch.Tensor, stored: Stored) -> dict[str, torch.Tensor]:
        """How what comes back differs from float32 `[n, V]`: float64 `[n]` by name.

        Their means over all places are what the report calls by these names.
        """

    @abstractmethod
    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """What to tell of the means of `errors` over a whole cache."""

    def label(self) -> str:
        """As typed on the command line."""
        fields = ",".join(f"{name}={value}" for name, value in self.model_dump().items())
        return f"{self.kind}:{fields}"

    def bytes_per_place(self, vocabulary: int) -> int:
        """Bytes that a place takes, headers of files left out."""
        columns = self.columns(vocabulary).values()
        return sum(column.dtype.itemsize * column.width for column in columns)


def id_type(vocabulary: int) -> torch.dtype:
    """The narrowest unsigned type that names every token."""
    return torch.uint16 if vocabulary <= 1 << 16 else torch.uint32


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """float64 `[n]`, nats, of float32 `[n, V]`; what has no probability counts for nothing.

    The terms are float32, the sum is not: over a large vocabulary the cost of writing a cache is a
    matter of how often all numbers are touched, and in which width.
    """
    terms: torch.Tensor = torch.special.entr(logprobs.exp())
    return terms.sum(-1, dtype=torch.float64)


def mean_of(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """float64 `[n]`: the sum of `probs * values`, both `[n, K]`; an infinite value of nothing is 0."""
    return (probs * values.masked_fill(probs == 0, 0.0)).sum(-1, dtype=torch.float64)
