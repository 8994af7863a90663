"""The stored form of bare keys and of values, with what stands out kept apart.

    key[s, j]   = half[j] * key_table[code] + middle[j]     ranges of channels, known beforehand
    value[s, j] = scale[s] * value_table[code] + offset[s]  ranges of rows
    but at the `apart` places of a row: the number that was kept there, as it was

Bare keys are keys without rotary positions: the key of slot s is read as its bare one turned to
position F + s, pair by pair, (j, j + n) by the angle (F + s) * frequencies[j]. The first F tokens of
the text are kept apart, whole, with their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit_kernels.kv_decode.cache import Rows
from compresskit_kernels.kv_decode.planes import packed_width

if TYPE_CHECKING:
    from typing import Self

    from compresskit_kernels.kv_decode.cache import Kind


@dataclass(frozen=True, eq=False)
class Known:
    """What one layer knows before it sees a token."""

    kind: Kind
    """int4, int3 or int2."""
    key_table: torch.Tensor
    """Float32 `[2^bits]`, rising."""
    value_table: torch.Tensor
    middle: torch.Tensor
    """Float32 `[1, K, 1, D]`: middle of the range of each channel of the bare keys."""
    half: torch.Tensor
    """Half the width of that range, positive."""
    apart: int
    """Numbers of a row that are kept as they are."""
    frequencies: torch.Tensor | None
    """Float32 `[n]`, radians a position, 2 n <= D; None: positions are not on the keys."""

    @cached_property
    def tables(self) -> tuple[int, ...] | None:
        """Addresses of key and value tables, middle, half, frequencies, and n; None if not dense.

        Asked at every step of every layer, so looked up once.
        """
        held = [self.key_table, self.value_table, self.middle, self.half]
        if self.frequencies is not None:
            held.append(self.frequencies)
        if not all(x.dtype is torch.float32 and x.is_contiguous() for x in held):
            return None
        pairs = (0, 0) if self.frequencies is None else (held[4].data_ptr(), len(held[4]))
        return (*(x.data_ptr() for x in held[:4]), *pairs)


class Held(NamedTuple):
    """What is stored of B sequences; C slots are coded, and F tokens before them are not."""

    keys: torch.Tensor
    """uint8 `[B, K, C, D * bits / 8]`, planes of bits as in `kv_decode.planes`."""
    key_outliers: torch.Tensor
    """`[B, K, C, apart]`, in the type of the model."""
    key_places: torch.Tensor
    """uint8 `[B, K, C, apart]`, or int16 where D is above 256."""
    values: torch.Tensor
    value_scales: torch.Tensor
    """bfloat16 `[B, K, C, 1]`."""
    value_offsets: torch.Tensor
    value_outliers: torch.Tensor
    value_places: torch.Tensor
    first_keys: torch.Tensor | None = None
    """`[B, K, F, D]`, floating-point; None: F is 0."""
    first_values: torch.Tensor | None = None

    @property
    def coded(self) -> int:
        """C."""
        return self.keys.shape[2]

    @property
    def first(self) -> int:
        """F."""
        return 0 if self.first_keys is None else self.first_keys.shape[2]

    @property
    def slots(self) -> int:
        """Tokens held."""
        return self.first + self.coded

    @classmethod
    def none(
        cls,
        known: Known,
        like: torch.Tensor,
        first_keys: torch.Tensor | None = None,
        first_values: torch.Tensor | None = None,
    ) -> Self:
        """Nothing coded yet, in the shape and type of new rows `like` `[B, K, T, D]`."""
        batch, heads, _, width = like.shape
        shape = batch, heads, 0
        codes = like.new_empty((*shape, packed_width(width, known.kind)), dtype=torch.uint8)
        apart = like.new_empty((*shape, known.apart))
        places = apart.to(place_type(width))
        grid = like.new_empty((*shape, 1), dtype=torch.bfloat16)
        return cls(codes, apart, places, codes, grid, grid, apart, places, first_keys, first_values)

    def read(self, known: Known, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Coded slots start to stop: keys with their positions, values; float32 `[B, K, n, D]`."""
        at = slice(start, stop)
        codes = self.keys[:, :, at]
        shape = (*codes.shape[:3], known.half.shape[-1])
        half, middle = known.half.expand(shape), known.middle.expand(shape)
        keys = Rows(known.kind, codes, half, middle, known.key_table).dequantise()
        values = Rows(
            known.kind,
            self.values[:, :, at],
            self.value_scales[:, :, at],
            self.value_offsets[:, :, at],
            known.value_table,
        ).dequantise()
        for rows, places, outliers in (
            (keys, self.key_places, self.key_outliers),
            (values, self.value_places, self.value_outliers),
        ):
            rows.scatter_(-1, places[:, :, at].long(), outliers[:, :, at].float())
        return turned(keys, self.first + start, 1, known.frequencies), values


def place_type(width: int) -> torch.dtype:
    """Places in rows of `width` in as few bytes as they fit."""
    return torch.uint8 if width <= 256 else torch.int16


def turned(
    rows: torch.Tensor, start: int, sign: int, frequencies: torch.Tensor | None
) -> torch.Tensor:
    """Rows, float32 `[B, K, T, D]`, turned to positions from `start` on, or back with sign -1."""
    if frequencies is None:
        return rows
    places = torch.arange(start, start + rows.shape[2], device=rows.device)
    angles = sign * places.unsqueeze(1) * frequencies.to(rows.device)
    cos, sin, n = angles.cos(), angles.sin(), frequencies.shape[0]
    first, second = rows[..., :n], rows[..., n : 2 * n]
    pairs = first * cos - second * sin, second * cos + first * sin
    return torch.cat((*pairs, rows[..., 2 * n :]), dim=-1)
