"""Levels for kv/kvquant from calibration text: where they lie, and how much each number matters.

    text ──► model ──► keys, bare of positions, and values of each layer      `observe`
                └──► their gradients of the loss
    keys     range of each channel, from quantiles ─┐
    values   range of each row, as when stored      ├─► numbers of about -1 to 1, outliers out
                                                    └─► weighted k-means: 2^bits levels   `fit`

A number is worth its squared gradient: the diagonal of the Fisher information, which says to second
order what an error there costs the prediction.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from compresskit_kernels.kv_bare.reference import far_from_mean, furthest, positive, row_range

from compresskit.hf.cache import TOKENS, Layer, build_cache
from compresskit.methods.kv._lloyd import fitted

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.methods.kv._unrotated import Positions
    from compresskit.system import System


class Levels(NamedTuple):
    """What one layer knows before it sees a token."""

    key_table: torch.Tensor
    """Float32 `[2^bits]`, ascending, in ranges of about -1 to 1."""
    value_table: torch.Tensor
    middle: torch.Tensor
    """Float32 `[1, K, 1, D]`: middle of the range of each channel of the bare keys."""
    half: torch.Tensor
    """Half the width of that range."""


class Seen(NamedTuple):
    """Rows of one layer, `[1, K, N, D]` float32, with what each number is worth."""

    keys: torch.Tensor
    values: torch.Tensor
    key_worth: torch.Tensor
    value_worth: torch.Tensor


class WatchLayer(Layer):
    """Holds keys and values as the model computed them, part of its graph of gradients."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold what comes in the first pass."""
        self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():
            # The first layer: weights are frozen, so nothing below it asks for gradients.
            key_states, value_states = (
                x if x.requires_grad else x.requires_grad_() for x in (key_states, value_states)
            )
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def watch(system: System, tokens: torch.Tensor) -> tuple[dict[int, WatchLayer], torch.Tensor]:
    """Run `tokens` `[1, S]`: layers by index, and the logits `[1, S, V]`."""
    layers: dict[int, WatchLayer] = {}

    def make(index: int) -> WatchLayer:
        return layers.setdefault(index, WatchLayer())

    logits = system.step(tokens, build_cache(system.model.config, make), keep=0)
    return layers, logits


def observe(
    system: System,
    rows: torch.Tensor,
    positions: Positions,
    *,
    skip: int,
    fisher: bool,
    progress: Callable[[int, int], None],
) -> dict[int, Seen]:
    """Run rows `[N, S]` of calibration text; leave out the first `skip` tokens of each.

    Without `fisher` every number is worth the same, and no gradient is computed.
    """
    seen: dict[int, list[Seen]] = {}
    for number, row in enumerate(rows):
        with torch.inference_mode(False), torch.set_grad_enabled(fisher):
            layers, logits = watch(system, row.unsqueeze(0))
            held = [x for layer in layers.values() for x in (layer.keys, layer.values)]
            if fisher:
                loss = torch.nn.functional.cross_entropy(
                    logits[0, :-1].float(), row[1:], reduction="sum"
                )
                worth = [slope.float() for slope in torch.autograd.grad(loss, held)]
            else:
                worth = [torch.ones_like(x, dtype=torch.float32) for x in held]
        for at, (index, layer) in enumerate(layers.items()):
            of_keys, of_values = worth[2 * at], worth[2 * at + 1]
            if fisher:  # a gradient turns with its key
                of_keys = positions.off(of_keys, 0)
            found = (positions.off(layer.keys.detach(), 0), layer.values.detach().float())
            parts = (*found, of_keys.square(), of_values.square())
            # Statistics of a large model outlive the pass: not in the device's memory.
            kept = Seen(*(part[..., skip:, :].cpu() for part in parts))
            seen.setdefault(index, []).append(kept)
        progress(number + 1, len(rows))
    return {
        index: Seen(*(torch.cat(part, dim=TOKENS) for part in zip(*found, strict=True)))
        for index, found in seen.items()
    }


def fit(seen: Seen, bits: int, outliers: float) -> Levels:
    """Choose ranges and levels, on the device of `seen`; `outliers` is the share kept apart."""
    low, high = _trimmed(seen.keys, outliers / 2)
    middle, half = (high + low) / 2, positive((high - low) / 2)
    z = (seen.keys - middle) / half
    apart = outlier_count(z.shape[-1], outliers)
    # An error of z is half a range in the key.
    key_table = _levels(z, furthest(z, apart), seen.key_worth * half.square(), bits)
    places = far_from_mean(seen.values, outlier_count(seen.values.shape[-1], outliers))
    offset, scale = row_range(seen.values, places)
    z, worth = (seen.values - offset) / scale, seen.value_worth * scale.square()
    return Levels(key_table, _levels(z, places, worth, bits), middle, half)


def _levels(z: torch.Tensor, places: torch.Tensor, worth: torch.Tensor, bits: int) -> torch.Tensor:
    kept = torch.ones_like(z, dtype=torch.bool).scatter_(-1, places, False)
    return fitted(z[kept], worth[kept], bits)


def _trimmed(keys: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest number of each channel `[1, K, 1, D]`, that share of rows left out."""
    ordered = keys.sort(dim=TOKENS).values
    last = ordered.shape[TOKENS] - 1
    cut = min(round(share * last), last // 2)
    return ordered[..., cut : cut + 1, :], ordered[..., last - cut : last - cut + 1, :]


def outlier_count(width: int, share: float) -> int:
    """Numbers of a row of `width` that are kept apart."""
    return math.ceil(width * share)
