"""Read `--student`, and let its makers follow one another.

layers:keep=0.5 + vocabulary:size=16384  ──► (Layers(keep=0.5), Vocabulary(size=16384))
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compresskit.errors import SpecError, UnknownName
from compresskit.hf.student.given import Given
from compresskit.hf.student.layers import Layers
from compresskit.hf.student.scratch import Scratch
from compresskit.hf.student.vocabulary import Vocabulary
from compresskit.hf.student.width import Width
from compresskit.spec import parse_sum

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from compresskit.hf.student.maker import Draft, Maker

MAKERS: Mapping[str, type[Maker]] = MappingProxyType(
    {maker.name: maker for maker in (Layers, Width, Scratch, Given, Vocabulary)}
)
"""Every maker by name."""

OPTION = "--student"


def parse(text: str) -> tuple[Maker, ...]:
    """The makers that `text` names, in order.

    Raises:
        UnknownName: no maker is called so.
        SpecError: no makers, wrong parameters, or an order that cannot work.
    """
    makers = []
    for name, params in parse_sum(text, option=OPTION):
        if name not in MAKERS:
            raise UnknownName("student maker", name, MAKERS)
        makers.append(MAKERS[name].decode(params, where=name))
    check(makers)
    return tuple(makers)


def check(makers: Sequence[Maker]) -> None:
    """Refuse makers that cannot follow one another.

    Raises:
        SpecError: says which, and what to write.
    """
    names = [maker.name for maker in makers]
    if not names:
        raise SpecError(f"{OPTION}: no maker is named. Known: {', '.join(MAKERS)}.")
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"{OPTION}: {name} is there twice. Say once how much is to be left.")
    if "scratch" in names and names[0] != "scratch":
        raise SpecError(
            f"{OPTION}: scratch begins from nothing, so what {names[0]} keeps of the teacher would be "
            "thrown away. Put scratch first."
        )
    if "given" in names and (names[0] != "given" or "scratch" in names):
        raise SpecError(
            f"{OPTION}: given takes another model in the place of all that was made before. Put it first, "
            "and leave scratch out."
        )
    if "scratch" in names and set(names) - {"scratch", "vocabulary"}:
        other = next(name for name in names if name not in ("scratch", "vocabulary"))
        raise SpecError(
            f"{OPTION}: there is nothing in random weights that {other} could choose by. Give scratch the "
            "sizes that you want in the end."
        )
    if "vocabulary" in names[:-1]:
        raise SpecError(
            f"{OPTION}: vocabulary gives tokens other numbers, and what follows it looks at text in the "
            "teacher's. Put vocabulary last."
        )


def shape(makers: Sequence[Maker], config: Any) -> Any:
    """The config of what `make` will return for a teacher of `config`; no weights are needed.

    Raises:
        SpecError: the makers do not suit such a model, or one another.
    """
    check(makers)
    for maker in makers:
        config = maker.shape(config)
    return config


def make(makers: Sequence[Maker], draft: Draft, rows: torch.Tensor, *, seed: int) -> Draft:
    """Let the makers work on `draft`, one after the other.

    rows: int64 `[R, L]`, training text in the teacher's tokens.

    Raises:
        SpecError: the makers do not suit the model, or one another.
        InputError: there is too little text to choose by.
        Conflict: the model is built in a way that cannot be cut.
    """
    check(makers)
    for maker in makers:
        draft = maker.make(draft, rows, seed=seed)
    return draft
