"""Put cache layers of ours into a system."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from compresskit.hf import attention
from compresskit.hf.cache import factory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic import JsonValue

    from compresskit.hf.cache import Layer
    from compresskit.system import System


def install(
    system: System,
    make_layer: Callable[[int], Layer],
    *,
    cache: str,
    nominal: Mapping[str, JsonValue],
) -> System:
    """Return `system` with `make_layer(index)` in place of every full-attention cache layer.

    Args:
        system: its model is made to attend with our function, for good: a layer answers attention,
            or at least sees the mask and can refuse a padded batch.
        make_layer: makes one empty layer.
        cache: one phrase for people: what the cache holds.
        nominal: what was asked for, so that it can be shown beside what was reached: `keep_share`
            (of the prompt), `keep_tokens` or `bits` (of a number, without scales).

    Raises:
        Conflict: the model has no full-attention layer, or its attention cannot be replaced.
    """
    new_cache = factory(system.model.config, make_layer)
    attention.use(system.model)
    facts = {**system.facts, "cache": cache, "cache_nominal": dict(nominal)}
    return replace(system, new_cache=new_cache, facts=MappingProxyType(facts))
