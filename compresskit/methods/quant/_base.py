"""The options that every quantiser of linear layers has."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from compresskit.method import AbstractMethod, Stage
from compresskit.traits import Effects, Trait


class AbstractQuant(AbstractMethod, ABC):
    """A method that replaces linear layers by packed ones."""

    stage: ClassVar[Stage] = Stage.WEIGHTS

    head: bool = True
    """Quantise the output head too; if it is tied, the embedding stays dense beside it."""
    embeddings: bool = False
    """Quantise the input embedding too; a tied one then shares the packed weight of the head."""
    skip: tuple[str, ...] = ()
    """Layers to leave dense, as patterns of module names, such as "*.down_proj"."""

    def effects(self) -> Effects:
        """Takes the float weights away, and with them the claim to equal tokens."""
        return Effects(
            requires=frozenset({Trait.MODULES, Trait.FLOAT_WEIGHTS}),
            removes=frozenset({Trait.FLOAT_WEIGHTS, Trait.LOSSLESS}),
        )
