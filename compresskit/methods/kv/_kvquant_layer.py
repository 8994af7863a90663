"""The cache of kv/kvquant: codes of bare keys and of values, outliers apart, the first tokens untouched.

    rows   0 1 2 3 4 | 5 6 7 ...
             first       codes, and in every row n numbers as they are: place, number

What one step reads is decoded a stretch of rows at a time, turned to its positions, attended to and
dropped, so that no full-precision copy of the cache exists while decoding.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from compresskit_kernels.kv_decode import MOST_QUERIES, Kind, Rows, quantise_to

from compresskit.errors import RunError
from compresskit.hf.cache import TOKENS
from compresskit.methods.kv import _blockwise
from compresskit.methods.kv._coded import FUSED, CodedLayer, Form
from compresskit.methods.kv._evict import refuse_other_masks
from compresskit.methods.kv._nonuniform import Levels, key_places, value_places, value_range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.hf.attention import Call
    from compresskit.methods.kv._unrotated import Positions

STRETCH = 1024
"""Rows decoded at a time: 8 heads of 128 in float32 are 4 MiB, about what a core's caches hold."""
FIRST = ("first_keys", "first_values")
"""Tensors of the first tokens; all others begin after them."""


class KVQuantLayer(CodedLayer):
    """Append-only: a token is coded once, by itself."""

    tensors = (
        *("keys", "key_outliers", "key_places", "first_keys"),
        *("values", "value_scales", "value_offsets", "value_outliers", "value_places"),
        "first_values",
    )
    holds = MappingProxyType(
        {
            **CodedLayer.holds,
            **dict.fromkeys(("key_outliers", "value_outliers"), "residual"),
            **dict.fromkeys(FIRST, "residual"),
            **dict.fromkeys(("key_places", "value_places"), "index"),
            **dict.fromkeys(("levels", "forms", "positions"), "tables"),
        }
    )
    fused = False

    key_outliers: torch.Tensor
    key_places: torch.Tensor
    first_keys: torch.Tensor | None
    value_scales: torch.Tensor
    value_offsets: torch.Tensor
    value_outliers: torch.Tensor
    value_places: torch.Tensor
    first_values: torch.Tensor

    def __init__(
        self,
        config: Any,
        levels: Levels,
        positions: Positions,
        *,
        bits: int,
        outliers: float,
        sink: int,
    ) -> None:
        """Hold nothing yet; see `KVQuant` for the parameters."""
        kind = cast("Kind", f"int{bits}")
        super().__init__(
            config, keys=Form(kind, levels.key_table), values=Form(kind, levels.value_table)
        )
        self.levels, self.positions = levels, positions
        self.outliers, self.sink = outliers, sink

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the first tokens of the text as they are; code the others."""
        start = self.get_seq_length()
        first = max(0, min(self.sink - start, keys.shape[TOKENS]))
        if first:
            self.append(first_keys=keys[..., :first, :], first_values=values[..., :first, :])
        if first == keys.shape[TOKENS]:
            return
        keys, values = keys[..., first:, :], values[..., first:, :]
        # The model hands out transposed views, which a search for the nearest level would copy.
        bare, values = self.positions.off(keys, start + first).contiguous(), values.contiguous()
        z = (bare - self.levels.middle) / self.levels.half
        key_at, value_at = key_places(z, self.outliers), value_places(values.float(), self.outliers)
        self.append(
            key_outliers=bare.gather(-1, key_at).to(keys.dtype),
            key_places=_stored(key_at, keys.shape[-1]),
            value_outliers=values.gather(-1, value_at),
            value_places=_stored(value_at, values.shape[-1]),
        )
        self.put(key=self.encode_keys(bare), value=self.encode_values(values))

    def put(self, *, key: Rows, value: Rows) -> None:  # type: ignore[override]
        """Append encoded rows: keys have no scales of their own."""
        self.append(keys=key.codes, values=value.codes)
        if value.offsets is not None:
            self.append(value_scales=value.scales, value_offsets=value.offsets)

    def encode_keys(self, keys: torch.Tensor) -> Rows:
        """Code bare keys, float32 `[B, K, T, D]`, in the ranges of their channels."""
        form, levels = self.forms["key"], self.levels
        middle, half = levels.middle.expand(keys.shape), levels.half.expand(keys.shape)
        return quantise_to(keys, form.kind, levels.key_table, half, middle)

    def encode_values(self, values: torch.Tensor) -> Rows:
        """Code values `[B, K, T, D]`, each row in the range that it has without outliers."""
        values, form = values.float(), self.forms["value"]
        offset, scale = value_range(values, value_places(values, self.outliers))
        rows = quantise_to(values, form.kind, self.levels.value_table, scale, offset)
        return replace(rows, scales=scale.bfloat16(), offsets=offset.bfloat16())

    def pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys with their positions, and values, float32 `[B, K, n, D]`, in the order of the text."""
        if self.first_keys is not None:
            yield self.first_keys.float(), self.first_values.float()
        rows = 0 if self.keys is None else self.keys.shape[TOKENS]
        for start in range(0, rows, STRETCH):
            yield self.read(start, min(start + STRETCH, rows))

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One piece: the coded rows start to stop."""
        at = slice(start, stop)
        codes = self.keys[..., at, :]
        shape = (*codes.shape[:TOKENS], stop - start, self.levels.middle.shape[-1])
        half, middle = self.levels.half.expand(shape), self.levels.middle.expand(shape)
        bare = Rows(self.forms["key"].kind, codes, half, middle, self.levels.key_table).dequantise()
        bare.scatter_(-1, self.key_places[..., at, :].long(), self.key_outliers[..., at, :].float())
        values = self.rows("value").between(start, stop).dequantise()
        places, outliers = self.value_places[..., at, :], self.value_outliers[..., at, :]
        values.scatter_(-1, places.long(), outliers.float())
        return self.positions.on(bare, self._first + start), values

    def attend(self, call: Call) -> torch.Tensor:
        """Attend over all rows: up to 8 queries a stretch at a time, more over a copy.

        Raises:
            RunError: a row of the batch is padded, or the mask is one of the user's own.
        """
        try:
            refuse_other_masks(call)
        except RunError as error:
            raise RunError(
                "kv/kvquant takes no padded batch and no attention mask: it takes rows by number for "
                "positions. Give prompts of equal length, or one at a time."
            ) from error
        few = call.query.shape[TOKENS] <= MOST_QUERIES and call.query.dtype in FUSED
        if few and call.rest.get("position_bias") is None:
            rows = self.get_seq_length()
            return _blockwise.attend(call.query, self.pieces(), rows=rows, scale=call.scale)
        keys, values = (torch.cat(part, TOKENS) for part in zip(*self.pieces(), strict=True))
        dtype = call.query.dtype
        return call.over(keys.to(dtype), values.to(dtype)).dense()

    @property
    def _first(self) -> int:
        """Tokens that are kept as they are."""
        return 0 if self.first_keys is None else self.first_keys.shape[TOKENS]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._first + super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens: coded ones, then the first of the text."""
        if tokens_to_remove > 0:
            raise RunError(f"crop takes minus the tokens to remove, not {tokens_to_remove}.")
        coded = 0 if self.keys is None else self.keys.shape[TOKENS]
        for name in self.tensors:
            held = getattr(self, name)
            if held is not None:
                beyond = -tokens_to_remove - (coded if name in FIRST else 0)
                left = max(held.shape[TOKENS] - max(beyond, 0), 0)
                setattr(self, name, held[..., :left, :])


def _stored(places: torch.Tensor, width: int) -> torch.Tensor:
    """Places in rows of `width` in as few bytes as they fit."""
    return places.to(torch.uint8 if width <= 256 else torch.int16)
