"""What methods around transformers' own caches share: how they are put in, and what they leave."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compresskit.errors import Conflict, RunError
from compresskit.hf.cache import factory
from compresskit.hf.wrapped import quantised_layer
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from pydantic import JsonValue

    from compresskit.hf.wrapped import Backend
    from compresskit.system import NewCache, System

EVERYTHING: Mapping[str, JsonValue] = MappingProxyType({"keep_share": 1.0})
"""Asked for: all tokens, as they are."""


def put(
    system: System, new_cache: NewCache, *, cache: str, nominal: Mapping[str, JsonValue]
) -> System:
    """Return `system` with other caches.

    Args:
        system: what to change.
        new_cache: makes one empty cache.
        cache: one phrase for people: what the cache holds.
        nominal: what was asked for (see `_layers.install`).
    """
    facts = {**system.facts, "cache": cache, "cache_nominal": dict(nominal)}
    return replace(system, new_cache=new_cache, facts=MappingProxyType(facts))


def quantised(
    system: System, backend: Backend, *, cache: str, bits: int, packs: int = 1, **options: int
) -> System:
    """Return `system` with quantised layers of transformers in place of its full-attention ones.

    Args:
        system: what to change.
        backend: which layers.
        cache: one phrase for people.
        bits: of a code.
        packs: how many groups must come at a time, because their codes share bytes.
        options: the layer's own.

    Raises:
        MissingExtra: a library is not installed.
        Conflict: the groups do not fit the heads, or the model or transformers has no such layer.
    """
    if "q_group_size" in options:
        _fits(f"kv/hf_{backend}", system.model.config.get_text_config(), options, packs)
    make_layer = quantised_layer(backend, **options)
    return put(
        system, factory(system.model.config, make_layer), cache=cache, nominal={"bits": bits}
    )


def _fits(name: str, config: Any, options: Mapping[str, int], packs: int) -> None:
    group, query_heads = options["q_group_size"], config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    if width % group:
        raise Conflict(
            f"{name}: groups of {group} do not divide the model's head dimension of {width}: they "
            f"would straddle heads and tokens. Use group = a divisor of {width}."
        )
    if heads * width // group % packs:
        raise Conflict(
            f"{name}: {packs} groups share their bytes, and a token of this model has "
            f"{heads * width // group} (heads {heads}, dimension {width}, group {group}): at some "
            f"lengths none could be stored. Use a smaller group."
        )


def rounded(*also: Trait) -> Effects:
    """What such a cache needs, and what it takes: `also` beside what all of them take."""
    return Effects(
        requires=frozenset({Trait.OWN_CACHE, Trait.DENSE_CACHE}),
        removes=frozenset(
            {
                # A second cache method would replace these layers, not wrap them.
                Trait.OWN_CACHE,
                Trait.DENSE_CACHE,
                Trait.ROLLBACK,
                Trait.STATIC_SHAPES,
                Trait.LOSSLESS,
                *also,
            }
        ),
    )


def whole(*, takes: tuple[Trait, ...], needs: tuple[Trait, ...] = ()) -> Effects:
    """What a cache needs and takes that gives back what was put in.

    It would replace what an earlier cache method has put in, so it wants the model's own.
    """
    return Effects(
        requires=frozenset({Trait.OWN_CACHE, Trait.DENSE_CACHE, Trait.FULL_CONTEXT, *needs}),
        removes=frozenset({Trait.OWN_CACHE, *takes}),
    )


def unpadded(system: System, name: str) -> System:
    """Return `system` refusing padded batches: `name` rounds all rows of a batch together."""
    step = system.step

    def checked(
        tokens: torch.Tensor, cache: Any, *, mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        if mask is not None and not bool(mask.all()):
            raise RunError(
                f"{name} takes no padded batch: padding would change how the tokens are rounded. "
                "Give prompts of equal length, or one at a time."
            )
        return step(tokens, cache, mask=mask, **options)

    return replace(system, step=checked)
