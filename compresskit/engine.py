"""What an engine is: it loads a model and says which traits it offers.

The native engine runs transformers models in our decode loop. A foreign engine (vLLM, llama.cpp)
would replace load and decode and offer fewer traits; methods that need more are then skipped with
a reason. To add one, write `compresskit/engines/<name>.py` with one final subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from compresskit.spec import Frozen

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from compresskit.device import Device
    from compresskit.spec import ModelSpec
    from compresskit.system import System
    from compresskit.traits import Trait


class AbstractEngine(Frozen, ABC):
    """An engine; its fields are its options."""

    @abstractmethod
    def traits(self, path: Path, device: Device) -> frozenset[Trait]:
        """Traits of the empty stack, read from the model's config: no weights are loaded."""

    @abstractmethod
    def open(self, path: Path, model: ModelSpec, device: Device) -> AbstractContextManager[System]:
        """Load the model in `path` and hold it for the duration."""

    def loses(self, device: Device) -> Mapping[Trait, str]:
        """Traits that options of this engine have taken away, each with the name of the option."""
        return {}

    def vet(self, path: Path, device: Device) -> None:
        """Refuse a model in `path` that the options do not suit, before any weights are loaded.

        Raises:
            Conflict: what does not fit, and what to do about it.
            SpecError: the options can only be honoured by a process that was started otherwise.
        """

    def for_others(self) -> AbstractEngine:
        """The engine for models beside the run's own (a draft): the same, unless options speak against it."""
        return self

    def requires(self) -> frozenset[Trait]:
        """What the decode mode needs to find after the last method."""
        return frozenset()

    def finish(self, system: System) -> System:
        """Last step after the stack: prepare the mode that was asked for (prepack, compile)."""
        return system
