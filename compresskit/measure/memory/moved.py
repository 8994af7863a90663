"""Bytes that one decode step has to read: what a perfect machine would still have to move.

    every weight that is multiplied or added      once, however many rows the batch has
    an embedding                                  a row for each row of the batch, since it is only
                                                  looked up; all of it where it is also the head
    experts                                       those that a token is sent to
    cache                                         all that it holds, without slack

Activations are left out: they need not leave the processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from compresskit.hf import modules
from compresskit.hf.modules import HoldsBytes

if TYPE_CHECKING:
    from collections.abc import Mapping


def moved_bytes(model: Any, cache: Mapping[str, int], *, batch: int) -> dict[str, int] | None:
    """Bytes by kind; None where it cannot be told which experts a step needs.

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
    add("cache", sum(size for kind, size in cache.items() if kind != "slack"))
    return moved


def _active(config: Any) -> tuple[int, int] | None:
    """Experts used per token, and how many there are."""
    used = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        of = getattr(config, name, None)
        if isinstance(used, int) and isinstance(of, int) and of:
            return used, of
    return None
