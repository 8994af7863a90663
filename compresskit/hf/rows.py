"""Rows of a cache as data: what one token leaves in every layer, and a fresh cache made from it.

    cache after a pass        row of a token: keys and values (or codes and scales) in every layer
    layer 0   keys   [1, K, S, D]  ─┐
              values [1, K, S, D]   │ read rows 0..n   ──►   stored   ──►   restore into a fresh cache
    layer 1   ...                  ─┘

That works where a layer holds one row a token, in order, and nothing else. `learn` does not trust a
class to say so: it runs five tokens through a cache and looks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from compresskit.errors import Conflict, RunError
from compresskit.hf.cache import TOKENS, Layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compresskit.system import System

FIRST, ALL = 3, 5
"""Tokens of the trial: so many in the first pass, so many after the second."""


class Slab(NamedTuple):
    """One tensor of one layer, `[1, heads, S, width]`."""

    layer: int
    name: str
    heads: int
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row in one head."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What a token leaves in a cache, and what else a layer has to be told to go on from there."""

    slabs: tuple[Slab, ...]
    kinds: tuple[type, ...]
    """Class of every layer."""
    settings: tuple[Mapping[str, object], ...]
    """What the first pass set in every layer apart from rows."""
    identity: str
    """Hash of the rows that fixed tokens leave: equal only for the same weights, type and cache."""

    @property
    def token_bytes(self) -> int:
        """Bytes that one token leaves in all layers."""
        return sum(slab.heads * slab.row_bytes for slab in self.slabs)

    def restore(self, cache: Any, rows: Iterable[torch.Tensor]) -> None:
        """Make the fresh `cache` one that has seen the tokens of `rows`.

        Args:
            cache: made by the `new_cache` that the layout was learned from, and not yet used.
            rows: one tensor for each of `slabs`, `[1, heads, n, width]`; the cache keeps them.
        """
        for layer, settings in zip(cache.layers, self.settings, strict=True):
            for name, value in settings.items():
                setattr(layer, name, value)
        for slab, tensor in zip(self.slabs, rows, strict=True):
            setattr(cache.layers[slab.layer], slab.name, tensor)

    def check(self, cache: Any) -> None:
        """Raise `RunError` unless the layers of `cache` are of the kinds that were learned."""
        kinds = tuple(type(layer) for layer in cache.layers)
        if kinds != self.kinds:
            raise RunError(
                f"this cache ({_names(kinds)}) is not the one whose rows are stored "
                f"({_names(self.kinds)}): prefixes are stored for one model and one cache method."
            )


def _names(kinds: tuple[type, ...]) -> str:
    return ", ".join(sorted({kind.__name__ for kind in kinds}))


@torch.inference_mode()
def learn(system: System) -> Layout:
    """Find out what a token leaves in the caches of `system`, and prove that it can be put back.

    Raises:
        Conflict: a layer holds something other than one row a token.
    """
    # Not from 0 on: padding has a small number in many models, and transformers warns of it.
    tokens = torch.arange(5, 5 + ALL, device=system.device.torch).unsqueeze(0)
    with system.attached():
        cache = system.new_cache(ALL)
        born = [dict(vars(layer)) for layer in cache.layers]
        system.step(tokens[:, :FIRST], cache)
        early = [dict(vars(layer)) for layer in cache.layers]
        expected = system.step(tokens[:, FIRST:], cache)
        slabs = [
            slab
            for index, layer in enumerate(cache.layers)
            for slab in _slabs(index, layer, early[index])
        ]
        settings = [
            _settings(index, layer, born[index], early[index])
            for index, layer in enumerate(cache.layers)
        ]
        kinds = tuple(type(layer) for layer in cache.layers)
        layout = Layout(tuple(slabs), kinds, tuple(settings), _identity(slabs, kinds, cache))
        again = system.new_cache(ALL)
        layout.restore(again, [early[slab.layer][slab.name].clone() for slab in slabs])
        logits = system.step(tokens[:, FIRST:], again)
    # Equal in every bit on a CPU; a GPU may choose another algorithm.
    if not torch.allclose(logits, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise Conflict(
            f"a cache of {_names(kinds)} does not go on from its rows as it did before: its layers "
            "keep something elsewhere, so prefixes cannot be stored. Leave the prefix store out."
        )
    return layout


def _slabs(index: int, layer: Any, early: Mapping[str, object]) -> list[Slab]:
    """The tensors of a layer; raises unless each has one row a token and old rows stay."""
    slabs = []
    for name in _tensor_names(index, layer):
        before, after = early.get(name), getattr(layer, name, None)
        if (
            not isinstance(before, torch.Tensor)
            or not isinstance(after, torch.Tensor)
            or after.dim() != 4
            or before.shape[TOKENS] != FIRST
            or after.shape[TOKENS] != ALL
        ):
            raise _refused(index, layer, f"its {name!r} have no row for each token")
        if not torch.equal(before, after[..., :FIRST, :]):
            raise _refused(index, layer, f"rows of its {name!r} change when later tokens come")
        slabs.append(Slab(index, name, after.shape[1], after.shape[3], after.dtype))
    return slabs


def _tensor_names(index: int, layer: Any) -> tuple[str, ...]:
    if isinstance(layer, Layer):
        names = layer.tensors
    elif type(layer) is DynamicLayer:  # its subclasses hold more than keys and values
        names = ("keys", "values")
    else:
        raise _refused(index, layer, "it does not hold every token's keys and values")
    if not layer.is_croppable:
        raise _refused(index, layer, "it drops tokens or codes them together")
    return names


def _settings(
    index: int, layer: Any, born: Mapping[str, object], early: Mapping[str, object]
) -> dict[str, object]:
    """What the first pass set, apart from rows; raises if that is a tensor or changes later."""
    rows = _tensor_names(index, layer)
    settings: dict[str, object] = {}
    for name, value in vars(layer).items():
        before = early.get(name)
        if name in rows or (value is before and value is born.get(name)):
            continue
        if not isinstance(value, _PLAIN) or type(value) is not type(before) or value != before:
            raise _refused(index, layer, f"its {name!r} changes from pass to pass")
        settings[name] = value
    return settings


_PLAIN = (bool, int, float, str, tuple, torch.dtype, torch.device, type(None))
"""Types of settings: nothing that two caches could share and change."""


def _refused(index: int, layer: Any, reason: str) -> Conflict:
    return Conflict(
        f"prefixes cannot be stored for cache layer {index} ({type(layer).__name__}): {reason}. "
        "Use a cache with a row for each token (dense, kv/int8), or leave the prefix store out."
    )


def _identity(slabs: Iterable[Slab], kinds: tuple[type, ...], cache: Any) -> str:
    digest = hashlib.sha256()
    for kind in kinds:
        digest.update(f"{kind.__module__}.{kind.__qualname__};".encode())
    for slab in slabs:
        rows = getattr(cache.layers[slab.layer], slab.name).contiguous()
        digest.update(repr(slab).encode())
        digest.update(rows.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
