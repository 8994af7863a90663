"""Bytes that one decode step has to read: what a perfect machine would still have to move.

    every weight that is multiplied or added      once, however many rows the batch has
    an embedding                                  a row for each row of the batch, since it is only
                                                  looked up; all of it where it is also the head
    experts                                       those that a token is sent to
    cache                                         all that it holds, without slack; of a layer with
                                                  `read_bytes`, what it says that it reads
    cache_copy                                    what a layer that dequantises everything writes
                                                  to attend to it, where it says so (`copied_bytes`)

Activations are left out: they need not leave the processor. So are the copies that appending makes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

from compresskit.hf import modules
from compresskit.hf.cache import cache_bytes
from compresskit.hf.modules import HoldsBytes

if TYPE_CHECKING:
    from collections.abc import Mapping


COPY, SLACK = "copy", "slack"
"""Kinds that are not read from the cache."""


def cache_traffic(*caches: Any) -> dict[str, int]:
    """Bytes that one decode step moves of `caches`, by kind as in `cache_bytes`, and `copy`.

    A layer that reads less than it holds has `read_bytes() -> {kind: bytes}`; one that writes a copy
    in full precision has `copied_bytes() -> int`.
    """
    traffic = cache_bytes(*caches)
    for layer in (layer for cache in caches for layer in cache.layers):
        if hasattr(layer, "read_bytes"):
            for kind, size in cache_bytes(SimpleNamespace(layers=(layer,))).items():
                traffic[kind] = traffic.get(kind, 0) - size
            for kind, size in layer.read_bytes().items():
                traffic[kind] = traffic.get(kind, 0) + size
        if hasattr(layer, "copied_bytes"):
            traffic[COPY] = traffic.get(COPY, 0) + layer.copied_bytes()
    return {kind: size for kind, size in traffic.items() if size}


def moved_bytes(model: Any, cache: Mapping[str, int], *, batch: int) -> dict[str, int] | None:
    """Bytes by kind; None where it cannot be told which experts a step needs.

    `cache` is what `cache_traffic` says, or `cache_bytes` where all that is held is read.
    One token needs `num_experts_per_tok` experts of a layer. How many the tokens of a larger batch
    need together depends on where they are sent, so no number is given for it.
    """
    moved: dict[str, int] = {}
    seen: set[int] = set()
    share = _active(model.config)

    def add(kind: str, size: int) -> None:
        if size:
            moved[kind] = moved.get(kind, 0) + size

    top = modules.head(model)
    tied = modules.is_tied(model)
    inside = {
        id(part)
        for module in model.modules()
        if type(module).__name__.endswith("Experts")
        for part in module.modules()
    }
    for module in model.modules():
        if isinstance(module, HoldsBytes):
            held = module.held_bytes()
            rows = getattr(module, "num_embeddings", None)
            if id(module) in inside:
                if share is None or batch != 1:
                    return None
                used, of = share
                held = {kind: size * used // of for kind, size in held.items()}
            elif rows is not None:  # an embedding is looked up
                held = {"embedding": batch * sum(held.values()) // rows}
            for kind, size in held.items():
                add(kind, size)
            continue
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            if isinstance(module, nn.Embedding) and not (
                tied and module is model.get_input_embeddings()
            ):
                # A head that is not tied must still be met as itself.
                add("embedding", batch * parameter.nbytes // parameter.shape[0])
                continue
            seen.add(id(parameter))
            if type(module).__name__.endswith("Experts"):
                if share is None or batch != 1:
                    return None
                used, of = share
                add("experts", parameter.nbytes * used // of)
            elif isinstance(module, nn.Embedding) or module is top:
                add("head", parameter.nbytes)
            else:
                add("norm" if "Norm" in type(module).__name__ else "linear", parameter.nbytes)
    add("cache", sum(size for kind, size in cache.items() if kind not in (COPY, SLACK)))
    add("cache_copy", cache.get(COPY, 0))
    return moved


def _active(config: Any) -> tuple[int, int] | None:
    """Experts used per token, and how many there are."""
    used = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        of = getattr(config, name, None)
        if isinstance(used, int) and isinstance(of, int) and of:
            return used, of
    return None
