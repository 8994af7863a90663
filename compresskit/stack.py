"""Order a stack, check it against the traits, and fold it over a system.

    engine + device traits ──method 1──► traits ──method 2──► traits ──► mode
                              requires?            requires?              requires?

The check needs the model's config but no weights, so a stack that cannot work is refused before
anything is loaded. Who removed a trait is remembered, so the message names both culprits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from compresskit.errors import Conflict
from compresskit.method import EXCLUSIVE, Stage
from compresskit.traits import Trait

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compresskit.method import Context, Placed
    from compresskit.system import System

_RANK = {stage: rank for rank, stage in enumerate(Stage)}


@dataclass(frozen=True)
class Layer:
    """One line of an explanation: the traits that hold after `name`, or why it cannot be applied."""

    name: str
    stage: str
    traits: frozenset[Trait]
    removed: frozenset[Trait]
    added: frozenset[Trait]
    conflict: str | None = None


def order(methods: Sequence[Placed]) -> tuple[Placed, ...]:
    """Sort by stage; inside a stage the user's order holds."""
    return tuple(sorted(methods, key=lambda placed: _RANK[placed.method.stage]))


def walk(
    methods: Sequence[Placed],
    start: frozenset[Trait],
    *,
    last: frozenset[Trait] = frozenset(),
    mode: str = "",
    lost: Mapping[Trait, str] = MappingProxyType({}),
) -> list[Layer]:
    """Follow the traits through the ordered stack up to the first conflict.

    `start` comes from the engine and the device; `last` is what the decode mode needs at the end;
    `lost` says of traits that are not in `start` which option of the engine took them.
    """
    traits = start
    culprit: dict[Trait, str] = {**lost}
    layers: list[Layer] = []
    filled: dict[Stage, str] = {}
    for placed in order(methods):
        effects, stage = placed.method.effects(), placed.method.stage
        conflict = _conflict(placed.name, effects.requires, effects.excludes, traits, culprit)
        if conflict is None and stage in EXCLUSIVE and stage in filled:
            conflict = (
                f"{filled[stage]} and {placed.name} both fill the {stage.value!r} stage; keep one."
            )
        if conflict is not None:
            layers.append(
                Layer(placed.name, stage.value, traits, frozenset(), frozenset(), conflict)
            )
            return layers
        filled[stage] = placed.name
        after = effects.after(traits)
        culprit.update(dict.fromkeys(traits - after, placed.name))
        layers.append(Layer(placed.name, stage.value, after, traits - after, after - traits))
        traits = after
    conflict = _conflict(f"mode {mode!r}", last, frozenset(), traits, culprit)
    if conflict is not None:
        layers.append(Layer(f"mode {mode!r}", "mode", traits, frozenset(), frozenset(), conflict))
    return layers


def _conflict(
    name: str,
    requires: frozenset[Trait],
    excludes: frozenset[Trait],
    traits: frozenset[Trait],
    culprit: dict[Trait, str],
) -> str | None:
    for trait in sorted(requires - traits):
        if trait in culprit:
            return f"{name} needs {trait.value!r}, which {culprit[trait]} does not leave."
        if trait is Trait.FLOAT_WEIGHTS:
            return (
                f"{name} needs {trait.value!r}: the model is already quantised. Start from its "
                "unquantised weights."
            )
        if trait is Trait.TRAINED:
            return (
                f"{name} needs {trait.value!r} weights: what it gains depends on what the model says, and "
                "random weights say nothing. Take a trained model, or speculative/oracle at a set rate."
            )
        return f"{name} needs {trait.value!r}, which the model, engine or device does not have."
    for trait in sorted(excludes & traits):
        return f"{name} cannot work with {trait.value!r}."
    return None


def check(
    methods: Sequence[Placed],
    start: frozenset[Trait],
    *,
    last: frozenset[Trait] = frozenset(),
    mode: str = "",
    lost: Mapping[Trait, str] = MappingProxyType({}),
) -> frozenset[Trait]:
    """Return the traits after the whole stack; raise `Conflict` with the first reason."""
    layers = walk(methods, start, last=last, mode=mode, lost=lost)
    for layer in layers:
        if layer.conflict is not None:
            raise Conflict(layer.conflict)
    return layers[-1].traits if layers else start


def build(methods: Sequence[Placed], system: System, ctx: Context) -> System:
    """Apply the methods in order."""
    for placed in order(methods):
        system = placed.method.apply(system, ctx)
    return system
