"""The formulas in plain torch: code new rows, and attend over all a stretch at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit_kernels.dispatch import Use, note
from compresskit_kernels.kv_bare import pieces
from compresskit_kernels.kv_bare.rows import Held, Known, place_type, turned
from compresskit_kernels.kv_decode.cache import quantise_to

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTEND = Use("kv_decode", "reference: bare keys by stretches, float32")
EXTEND = Use("kv_extend", "reference: bare keys, concatenated")


def supports(x: torch.Tensor, *_: object) -> bool:
    """Anything that floats."""
    return x.is_floating_point()


def attend(q: torch.Tensor, known: Known, held: Held, scale: float, stretch: int) -> torch.Tensor:
    """As `kv_decode_bare`, `stretch` slots decoded at a time."""
    note(ATTEND)
    parts = read(known, held, stretch)
    return pieces.attend(q, parts, rows=held.slots, scale=scale).transpose(1, 2)


def read(known: Known, held: Held, stretch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys with their positions, and values, float32 `[B, K, n, D]`, in the order of the text."""
    if held.first_keys is not None and held.first_values is not None:
        yield held.first_keys.float(), held.first_values.float()
    for start in range(0, held.coded, stretch):
        yield held.read(known, start, min(start + stretch, held.coded))


def extend(known: Known, held: Held, keys: torch.Tensor, values: torch.Tensor) -> Held:
    """As `kv_extend_bare`."""
    note(EXTEND)
    kind, width = known.kind, keys.shape[-1]
    # The model hands out transposed views, which a search for the nearest level would copy.
    bare = turned(keys.float(), held.slots, -1, known.frequencies).contiguous()
    values = values.contiguous()
    half, middle = known.half.expand(bare.shape), known.middle.expand(bare.shape)
    key_at = furthest((bare - middle) / half, known.apart)
    value_at = far_from_mean(values.float(), known.apart)
    offset, scale = row_range(values.float(), value_at)
    new = Held(
        quantise_to(bare, kind, known.key_table, half, middle).codes,
        bare.gather(-1, key_at).to(keys.dtype),
        key_at.to(place_type(width)),
        quantise_to(values, kind, known.value_table, scale, offset).codes,
        scale.bfloat16(),
        offset.bfloat16(),
        values.gather(-1, value_at),
        value_at.to(place_type(width)),
    )
    coded = (torch.cat(pair, dim=2) for pair in zip(held[:8], new[:8], strict=True))
    return Held._make((*coded, held.first_keys, held.first_values))


def furthest(z: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` numbers of each row lie that are furthest from zero: int64 `[..., count]`."""
    return z.abs().topk(count, dim=-1).indices


def far_from_mean(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Where the numbers lie that are furthest from the mean of their row: int64 `[..., count]`."""
    return furthest(rows - rows.mean(-1, keepdim=True), count)


def row_range(rows: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and half width of each row without the numbers at `places`, float32 `[..., 1]`.

    Both are numbers that bfloat16 has, which is how they are stored.
    """
    low = rows.scatter(-1, places, torch.inf).amin(-1, keepdim=True)
    high = rows.scatter(-1, places, -torch.inf).amax(-1, keepdim=True)
    offset, scale = (high + low) / 2, positive((high - low) / 2)
    return offset.bfloat16().float(), scale.bfloat16().float()


def positive(x: torch.Tensor) -> torch.Tensor:
    """`x`, with the smallest normal number in place of zero: the scale of numbers all equal."""
    return x.clamp_min(torch.finfo(torch.float32).tiny)
