"""The cache of kv/kvquant: codes of bare keys and of values, outliers apart, the first tokens untouched.

    rows   0 1 2 3 4 | 5 6 7 ...
             first       codes, and in every row n numbers as they are: place, number

What one step reads is decoded, turned to its positions, attended to and dropped, a tile or a stretch
of rows at a time (`kv_bare`), so that no full-precision copy of the cache exists while decoding.
"""

from __future__ import annotations

from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from compresskit_kernels.kv_bare import (
    Held,
    Known,
    kv_decode_bare,
    kv_extend_bare,
    pieces,
    reference,
)
from compresskit_kernels.kv_decode import MOST_QUERIES, Kind

from compresskit.errors import RunError
from compresskit.hf.cache import TOKENS
from compresskit.methods.kv._coded import FUSED, AnsweringLayer
from compresskit.methods.kv._evict import refuse_other_masks
from compresskit.methods.kv._nonuniform import Levels, outlier_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.hf.attention import Call
    from compresskit.methods.kv._unrotated import Positions

STRETCH = 1024
"""Rows decoded at a time: 8 heads of 128 in float32 are 4 MiB, about what a core's caches hold."""
FIRST = ("first_keys", "first_values")
"""Tensors of the first tokens; all others begin after them."""
CODED = Held._fields[: -len(FIRST)]
_HELD = attrgetter(*Held._fields)


class KVQuantLayer(AnsweringLayer):
    """Append-only: a token is coded once, by itself. Its tensors are those of `kv_bare.Held`."""

    tensors = Held._fields
    holds = MappingProxyType(
        {
            **dict.fromkeys(("keys", "values"), "codes"),
            **dict.fromkeys(("value_scales", "value_offsets"), "scales"),
            **dict.fromkeys(("key_outliers", "value_outliers", *FIRST), "residual"),
            **dict.fromkeys(("key_places", "value_places"), "index"),
            **dict.fromkeys(("levels", "positions"), "tables"),
        }
    )

    first_keys: torch.Tensor | None
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
        super().__init__(config)
        self.kind = cast("Kind", f"int{bits}")
        self.levels, self.positions = levels, positions
        self.outliers, self.sink = outliers, sink
        self._told: tuple[Levels, Known] | None = None

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the first tokens of the text as they are; code the others."""
        first = max(0, min(self.sink - self.get_seq_length(), keys.shape[TOKENS]))
        if first:
            self.append(first_keys=keys[..., :first, :], first_values=values[..., :first, :])
        if first == keys.shape[TOKENS]:
            return
        keys, values = keys[..., first:, :], values[..., first:, :]
        known = self.known()
        held = self.held() or Held.none(known, keys, self.first_keys, self.first_values)
        for name, coded in zip(CODED, kv_extend_bare(known, held, keys, values), strict=False):
            setattr(self, name, coded)

    def known(self) -> Known:
        """What the kernels are told of this layer: made once for the levels that it has."""
        levels, rotary = self.levels, self.positions.rotary
        if self._told is None or self._told[0] is not levels:
            known = Known(
                self.kind,
                levels.key_table,
                levels.value_table,
                levels.middle,
                levels.half,
                outlier_count(levels.half.shape[-1], self.outliers),
                None if rotary is None else rotary.frequencies,
            )
            self._told = levels, known
        return self._told[1]

    def held(self) -> Held | None:
        """All rows as they are stored, or None before the first coded one."""
        if self.keys is None:
            return None
        return Held._make(_HELD(self))

    def pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys with their positions, and values, float32 `[B, K, n, D]`, in the order of the text."""
        held = self.held()
        if held is not None:
            yield from reference.read(self.known(), held, STRETCH)
        elif self.first_keys is not None:
            yield self.first_keys.float(), self.first_values.float()

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One piece: the coded rows start to stop."""
        held = self.held()
        if held is None:
            raise ValueError(f"rows {start} to {stop} of a cache without coded rows.")
        return held.read(self.known(), start, stop)

    def attend(self, call: Call) -> torch.Tensor:
        """Attend over all rows: up to 8 queries over the codes, more over a copy.

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
            held = self.held()
            if held is None:
                rows = self.get_seq_length()
                return pieces.attend(call.query, self.pieces(), rows=rows, scale=call.scale)
            found = kv_decode_bare(
                call.query, self.known(), held, scale=call.scale, stretch=STRETCH
            )
            return found.transpose(1, 2)
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
