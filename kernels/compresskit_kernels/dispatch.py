"""Choose an implementation of an operation, and remember which one really ran.

    stored weight --choose(op, x, weight, impl)--> Implementation --prepare--> Prepared --(x)--> y
    (portable)                                                     (laid out once, at load)

The choice is made once per weight, not once per call: what depends on the call (the number of
rows) is a branch inside the prepared weight. Each branch calls `note` with a constant, one set
insertion, so that `used()` names what ran rather than what was meant to run. An explicit choice
that cannot run raises; the automatic one takes the first that can, and the record shows it.
`forced` makes the explicit choice for every layer of a model that is built under it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

W = TypeVar("W")
F = TypeVar("F")


class Prepared(ABC):
    """A weight laid out for one implementation: call it with x `[..., K]` to get `[..., N]`."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the transposed weight, in the type of x."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that stays in memory, by role."""

    @abstractmethod
    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows `index` `[...]` (int64) of the weight in float32, `[..., K]`: an embedding's look-up."""

    def held_bytes(self) -> dict[str, int]:
        """Bytes that stay in memory, padding included: codes or packed, scales, zero_points."""
        return {role: tensor.nbytes for role, tensor in self.tensors().items()}


@dataclass(frozen=True)
class Implementation(Generic[W]):
    """One way to run an operation."""

    name: str
    """What a caller asks for."""
    detail: str
    """What the record says: the routines behind the name and when each runs."""
    needs: str
    """What `supports` checks, in words; ends the message of a refused explicit choice."""
    supports: Callable[[torch.Tensor, W], bool]
    """Whether it can take an input of this device, type and width, and this kind of weight."""
    prepare: Callable[[W], Prepared]
    """Lay out a stored weight."""
    automatic: bool = True
    """Whether `auto` may take it; an interpreted kernel runs only where it is asked for."""


@dataclass(frozen=True)
class Op(Generic[W]):
    """An operation and its implementations, fastest first."""

    name: str
    implementations: tuple[Implementation[W], ...]


class Use(NamedTuple):
    """One routine of one operation; module constants, so that noting them builds nothing."""

    op: str
    routine: str


_ran: set[Use] = set()

note = _ran.add
"""Record that a routine ran; idempotent, and cheap enough for every call."""


def used() -> dict[str, tuple[str, ...]]:
    """Operation -> routines that have run since the last `reset`, sorted."""
    return {
        op: tuple(sorted(u.routine for u in _ran if u.op == op))
        for op in sorted({u.op for u in _ran})
    }


def reset() -> None:
    """Forget what has run."""
    _ran.clear()


_wish: ContextVar[str] = ContextVar("implementation", default="auto")


@contextmanager
def forced(impl: str) -> Iterator[None]:
    """Let `impl` take the place of `auto` in every choice made in this block; `auto` undoes it."""
    token = _wish.set(impl)
    try:
        yield
    finally:
        _wish.reset(token)


def choose(op: Op[W], x: torch.Tensor, weight: W, impl: str = "auto") -> Implementation[W]:
    """Return the implementation called `impl`, or for `auto` the first that supports both.

    `x` may be any tensor of the right device, type and last dimension.

    Raises:
        LookupError: there is no implementation of that name.
        ValueError: it cannot take this input or weight, or nothing can.
    """
    if impl == "auto":
        impl = _wish.get()
    if impl == "auto":
        for candidate in op.implementations:
            if candidate.automatic and candidate.supports(x, weight):
                return candidate
        raise ValueError(
            f"{op.name}: nothing supports {_describe(x)}; the input must be floating-point."
        )
    for candidate in op.implementations:
        if candidate.name == impl:
            if candidate.supports(x, weight):
                return candidate
            raise ValueError(
                f"{op.name}: {impl!r} cannot take {_describe(x)}; it needs {candidate.needs}. "
                "Use 'auto' to take what can run."
            )
    known = ", ".join(candidate.name for candidate in op.implementations)
    raise LookupError(f"{op.name}: unknown implementation {impl!r}. Known: auto, {known}.")


@dataclass(frozen=True)
class Way(Generic[F]):
    """One way to compute a function that has no weight to lay out beforehand."""

    name: str
    """What a caller asks for."""
    needs: str
    """What `supports` checks, in words; ends the message of a refused explicit choice."""
    supports: Callable[..., bool]
    """Whether it can take these arguments, the tensors that matter in the order of `choose_way`."""
    run: F
    """The function; it notes what ran."""


def choose_way(
    function: str, ways: tuple[Way[F], ...], impl: str, x: torch.Tensor, *others: object
) -> F:
    """Return the function called `impl`, or for `auto` the first that supports x and the others.

    Raises:
        LookupError: there is no implementation of that name.
        ValueError: it cannot take these arguments.
    """
    if impl == "auto":
        impl = _wish.get()
    for way in ways:
        if impl == way.name or impl == "auto":
            if way.supports(x, *others):
                return way.run
            if impl != "auto":
                raise ValueError(
                    f"{function}: {impl!r} cannot take {_describe(x)}; it needs {way.needs}. "
                    "Use 'auto' to take what can run."
                )
    if impl == "auto":
        raise ValueError(f"{function}: nothing supports {_describe(x)}.")
    known = ", ".join(way.name for way in ways)
    raise LookupError(f"{function}: unknown implementation {impl!r}. Known: auto, {known}.")


def _describe(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)} on {x.device.type}"
