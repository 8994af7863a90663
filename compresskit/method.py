"""What a compression method is, and how to add one.

To add a method, write one file `compresskit/methods/<family>/<name>.py` with one final subclass
of `AbstractMethod`. Its fields are its parameters (the docstring under each field is its help
text), `effects` says what it needs and changes, `apply` returns a changed `System`. Nothing else
is edited: the catalogue finds the file by its path, the contract tests run over it, and the
README table is generated. Methods of other packages register under the entry-point group
`compresskit.methods`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pydantic import JsonValue

from compresskit.spec import Frozen
from compresskit.stats.speculation import FLAT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from compresskit.record import Training
    from compresskit.spec import ModelSpec
    from compresskit.stats.speculation import Costs
    from compresskit.system import System
    from compresskit.traits import Effects, Trait


class Stage(StrEnum):
    """Where a method acts. Stacks are ordered by stage; inside a stage the user's order holds."""

    MODEL = "model"
    WEIGHTS = "weights"
    PROMPT = "prompt"
    CACHE = "cache"
    DECODE = "decode"
    ROUTE = "route"
    FRONT = "front"


EXCLUSIVE = frozenset({Stage.MODEL, Stage.DECODE, Stage.ROUTE})
"""Stages that only one method of a stack can fill."""


class Progress(Protocol):
    """Told how far a long step has come; the command line turns it into a bar."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """`done` of `total` steps of `label` are over."""


class Load(Protocol):
    """Loads a further model; its decode mode is not prepared yet (`Context.finish`)."""

    def __call__(
        self, model: ModelSpec, methods: tuple[str, ...] = (), needs: frozenset[Trait] = frozenset()
    ) -> System:
        """Return `model` with `methods`, as typed on the command line, applied.

        Raises:
            Conflict: the methods do not fit it, or do not leave it the traits that it `needs`.
        """


def quiet(label: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Context:
    """What a method may ask for while it is applied; injected, so methods import no loader."""

    load: Load
    """Loads another model (a draft, a student) on the same device."""
    calibration: Callable[[str, int], list[int]]
    """That many tokens of the named text (`calibration` is the shipped one), kept apart from
    evaluation text."""
    seed: int
    dtype: str
    """Computation type of the run: float32, bfloat16 or float16."""
    progress: Progress = quiet
    finish: Callable[[System], System] = lambda system: system
    """Prepare a further system (a draft, a view of the target) for the run's decode mode."""
    step_cost: Callable[[System], Costs] = lambda system: FLAT
    """Time passes of the widths that a finished system asks for, and what drafting costs beside them,
    at the run's batch and context. Goes into the record, raw."""
    replaced: Replaced | None = None
    """What stands in for what, where a method of the stack `stands_in` for the run's model."""
    trained: Callable[[Training], None] = lambda cost: None
    """Told what training the loaded model cost before the run. Goes into the record."""


class Replaced(NamedTuple):
    """Two models, both as their folders show them: no weights of `asked` are ever loaded."""

    asked: Outline
    """The run's model."""
    loaded: Outline
    """The one that took its place."""


@dataclass(frozen=True)
class Outline:
    """A model as its folder shows it: no weights."""

    name: str
    """As in the spec."""
    path: Path
    config: Mapping[str, Any]
    """config.json as it stands."""
    bytes: int
    """Size of its weight files."""
    revision: str = ""
    """As resolved: a commit, or a hash of the weights."""


class AbstractMethod(Frozen, ABC):
    """A compression method; concrete classes are final, one per file."""

    stage: ClassVar[Stage]
    example: ClassVar[Mapping[str, JsonValue]] = {}
    """Parameters that make sense on the tiny model; the contract tests use them."""

    @abstractmethod
    def effects(self) -> Effects:
        """Say what the method requires and changes; may depend on parameters, never on weights."""

    def stands_in(self) -> ModelSpec | None:
        """The model that is loaded instead of the run's, if this method brings one.

        The rest of the stack is checked against that model and applied to it; the run's own model
        stays what quality is measured against. Only the `MODEL` stage may say so.
        """
        return None

    def vet(self, target: Outline, find: Callable[[ModelSpec], Outline]) -> None:
        """Refuse a model that the parameters do not suit, before any weights are loaded.

        `target` is the model that the method is applied to; for one that `stands_in`, the run's.
        `find` outlines another model that the parameters name, fetching it if need be.

        Raises:
            Conflict: what does not fit, and what to do about it.
        """

    @abstractmethod
    def apply(self, system: System, ctx: Context) -> System:
        """Return the changed system. May change `system.model` in place: each run loads its own."""


@dataclass(frozen=True)
class Placed:
    """A method with its name in the catalogue."""

    name: str
    method: AbstractMethod
