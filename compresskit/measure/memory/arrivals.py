"""What a model hands to its cache, and so what its own cache would hold: the baseline of every ratio.

    model ──► cache.update(keys, values, layer) ──► whatever layer a method put there
                      │ noted: shape and type
                      ▼
    the model's own layer, asked with as many tokens (on no device) ──► numbers, bytes

Key/value heads, not query heads; the type the model computes in; sliding layers with their window
only; layers that share the keys of others not at all: all of it is how the model is, not what its
config is thought to mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.hf.cache import new_dynamic

if TYPE_CHECKING:
    from collections.abc import Callable


class Rows(NamedTuple):
    """Keys and values of one layer, but for the number of tokens."""

    keys: tuple[int, int, int]
    """B, K, D."""
    values: tuple[int, int, int]
    dtype: torch.dtype


@dataclass
class Arrivals:
    """Listens to caches while a prompt is run."""

    seen: list[dict[int, Rows]] = field(default_factory=list)
    """For each cache, layer -> what arrived."""
    _stop: list[Callable[[], None]] = field(default_factory=list)

    def listen(self, cache: Any) -> None:
        """Note what is handed to `cache` from now on."""
        rows: dict[int, Rows] = {}
        self.seen.append(rows)
        update = cache.update

        def noted(
            keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            rows[layer_idx] = Rows(_shape(keys), _shape(values), keys.dtype)
            return update(keys, values, layer_idx, *args, **kwargs)

        cache.update = noted
        self._stop.append(lambda: vars(cache).pop("update", None))

    def stop(self) -> None:
        """Leave the caches alone: a compiled step would trace into the listening."""
        for leave in self._stop:
            leave()
        self._stop.clear()

    def dense(self, config: Any, tokens: int) -> dict[str, int] | None:
        """`bytes` and `numbers` of the model's own cache after `tokens` tokens a row.

        None if nothing arrived. States of recurrent layers are left out: no method changes them.
        """
        held = [tensor for rows in self.seen for tensor in _held(config, rows, tokens)]
        if not held:
            return None
        return {
            "bytes": sum(tensor.nbytes for tensor in held),
            "numbers": sum(tensor.numel() for tensor in held),
        }


def _shape(rows: torch.Tensor) -> tuple[int, int, int]:
    batch, heads, _, width = rows.shape
    return batch, heads, width


def _held(config: Any, rows: dict[int, Rows], tokens: int) -> list[torch.Tensor]:
    """Keys and values that the layers of a dense cache would keep; shapes without memory."""
    cache = new_dynamic(config)
    kept: list[torch.Tensor] = []
    for index, one in rows.items():
        layer = cache.layers[index]
        layer.update(
            *(
                torch.empty(batch, heads, tokens, width, dtype=one.dtype, device="meta")
                for batch, heads, width in (one.keys, one.values)
            )
        )
        kept += [layer.keys, layer.values]
    return kept
