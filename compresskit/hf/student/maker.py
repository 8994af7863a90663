"""What makes a student out of a teacher, and how to add another way.

A maker is one file with one final subclass of `Maker`; its fields are its parameters, and `MAKERS`
in `student.parse` lists it by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from compresskit.spec import Frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from pydantic import JsonValue


@dataclass(frozen=True)
class Draft:
    """A student in the making."""

    model: Any
    """A transformers causal language model."""
    tokenizer: Any
    """The transformers tokenizer that belongs to it."""
    blocks: tuple[int, ...]
    """For each block of the student, the teacher's block that it stands for: the one it was copied
    from, or, where nothing was copied, the one at the same share of the depth."""
    facts: Mapping[str, JsonValue] = field(default_factory=lambda: MappingProxyType({}))
    """What the makers have to say: which blocks were kept, and why."""


class Maker(Frozen, ABC):
    """One way to make a model smaller."""

    name: ClassVar[str]

    @abstractmethod
    def shape(self, config: Any) -> Any:
        """The config of what `make` will return for a model of `config`; a copy, no weights needed.

        Raises:
            SpecError: the parameters do not suit such a model.
        """

    @abstractmethod
    def make(self, draft: Draft, rows: torch.Tensor, *, seed: int) -> Draft:
        """Return the smaller model; may take the weights of `draft.model` apart.

        rows: int64 `[R, L]`, tokens of the training text, for makers that look at activations.
        """
