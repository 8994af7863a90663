"""The trait algebra: order, refusals with both culprits, exclusive stages."""

from __future__ import annotations

from typing import ClassVar, final

import pytest

from compresskit import stack
from compresskit.errors import Conflict
from compresskit.method import AbstractMethod, Context, Placed, Stage
from compresskit.system import System
from compresskit.traits import Effects, Trait


def method(
    stage: Stage,
    *,
    requires: tuple[Trait, ...] = (),
    removes: tuple[Trait, ...] = (),
    excludes: tuple[Trait, ...] = (),
):
    at = stage

    @final
    class Fake(AbstractMethod):
        stage: ClassVar[Stage] = at

        def effects(self) -> Effects:
            return Effects(
                requires=frozenset(requires),
                removes=frozenset(removes),
                excludes=frozenset(excludes),
            )

        def apply(self, system: System, ctx: Context) -> System:
            return system

    return Fake()


EVICT = Placed(
    "kv/evict",
    method(
        Stage.CACHE, requires=(Trait.FULL_CONTEXT,), removes=(Trait.FULL_CONTEXT, Trait.ROLLBACK)
    ),
)
DRAFT = Placed("speculative/draft", method(Stage.DECODE, requires=(Trait.ROLLBACK,)))
START = frozenset({Trait.FULL_CONTEXT, Trait.ROLLBACK, Trait.STATIC_SHAPES})


def test_stages_order_a_stack_whatever_the_user_typed() -> None:
    assert [placed.name for placed in stack.order([DRAFT, EVICT])] == [
        "kv/evict",
        "speculative/draft",
    ]


def test_a_conflict_names_the_method_the_trait_and_who_took_it() -> None:
    with pytest.raises(
        Conflict, match="speculative/draft needs 'rollback', which kv/evict does not leave"
    ):
        stack.check([DRAFT, EVICT], START)


def test_a_trait_that_never_was_is_blamed_on_the_system() -> None:
    with pytest.raises(Conflict, match="the model, engine or device does not have"):
        stack.check([DRAFT], frozenset())


def test_an_exclusive_stage_takes_one_method() -> None:
    with pytest.raises(Conflict, match="both fill the 'decode' stage; keep one"):
        stack.check([DRAFT, DRAFT], START)


def test_an_excluded_trait_is_refused() -> None:
    picky = Placed("kv/picky", method(Stage.CACHE, excludes=(Trait.ROLLBACK,)))
    with pytest.raises(Conflict, match="kv/picky cannot work with 'rollback'"):
        stack.check([picky], START)


def test_the_mode_is_checked_last() -> None:
    shapeless = Placed("kv/grow", method(Stage.CACHE, removes=(Trait.STATIC_SHAPES,)))
    needs = frozenset({Trait.STATIC_SHAPES})
    assert stack.check([], START, last=needs, mode="compiled") == START
    with pytest.raises(
        Conflict, match="mode 'compiled' needs 'static_shapes', which kv/grow does not leave"
    ):
        stack.check([shapeless], START, last=needs, mode="compiled")


def test_the_walk_shows_each_step_and_stops_at_the_first_conflict() -> None:
    layers = stack.walk([EVICT, DRAFT, DRAFT], START)
    assert [layer.conflict is None for layer in layers] == [True, False]
    assert layers[0].removed == {Trait.FULL_CONTEXT, Trait.ROLLBACK}
