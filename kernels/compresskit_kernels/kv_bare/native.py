"""Our CPU kernels (`native/bare_attention.cpp`, `native/bare_encode.cpp`)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch

from compresskit_kernels.dispatch import Use, note
from compresskit_kernels.kv_bare.rows import Held
from compresskit_kernels.kv_decode.native import KINDS, MOST_QUERIES, TYPES, WIDEST
from compresskit_kernels.native import build

if TYPE_CHECKING:
    from compresskit_kernels.kv_bare.rows import Known

ATTEND = Use("kv_decode", "native: bare keys by tiles of 16 tokens")
EXTEND = Use("kv_extend", "native: bare keys, encoded behind a copy")
NEEDS = (
    f"1 to {MOST_QUERIES} queries in float32 or bfloat16, coded rows of a multiple of 32 up to "
    f"{WIDEST}, a multiple of 16 rotary pairs, on an x86 CPU with AVX-512 VBMI and BF16, and a C++ "
    "compiler"
)
ONE_SPAN = 1 << 60
"""Tokens that share the ranges of the keys: all."""
# Fields as in the sources, 8 bytes each.
_CALL = struct.Struct("=2q5q3q1q1d1q3q1q" + 2 * "5q3q3q3q6q" + 2 * "2q4q")
_ENCODE = struct.Struct("=2q6q8q2q3q2q8q8q")


def supports(q: torch.Tensor, known: Known, held: Held) -> bool:
    """Whether the kernel reads these tensors."""
    first_keys, first_values = held.first_keys, held.first_values
    return (
        q.dtype in (torch.float32, torch.bfloat16)
        and 1 <= q.shape[2] <= MOST_QUERIES
        and q.stride(3) == 1
        and held.keys.shape[2] > 0
        and (first_keys is None or _whole(first_keys))
        and (first_values is None or _whole(first_values))
        and _readable(q, known, held)
    )


def extends(keys: torch.Tensor, known: Known, held: Held, values: torch.Tensor) -> bool:
    """Whether `extend` takes these tensors."""
    return (
        keys.dtype in TYPES
        and keys.dtype is values.dtype is held.key_outliers.dtype
        and keys.stride(3) == values.stride(3) == 1
        and _readable(keys, known, held)
    )


def _readable(x: torch.Tensor, known: Known, held: Held) -> bool:
    width, tables = x.shape[3], known.tables
    return (
        x.device.type == "cpu"
        and width % 32 == 0
        and width <= WIDEST
        and tables is not None
        and tables[5] % 16 == 0
        and held.key_outliers.dtype in TYPES
        and held.key_outliers.dtype is held.value_outliers.dtype
        and all(part.is_contiguous() or _dense(part) for part in held[:8])
        and build.available()
    )


def _dense(part: torch.Tensor) -> bool:
    """Whether the rows of a head lie one after the other; heads may be further apart (crops are)."""
    strides = part.stride()
    return strides[3] == 1 and strides[2] == part.shape[3]


def _whole(first: torch.Tensor) -> bool:
    return first.dtype in TYPES and first.stride(3) == 1


def attend(q: torch.Tensor, known: Known, held: Held, scale: float, stretch: int) -> torch.Tensor:
    """As `kv_decode_bare`, without asking `supports` again; `stretch` is the reference's."""
    note(ATTEND)
    batch, heads, queries, width = q.shape
    size, strides, coded = q.element_size(), q.stride(), held.keys.shape[2]
    kind, tables = KINDS[known.kind], known.tables
    assert tables is not None, "`supports` asked"
    key_table, value_table, middle, half, frequencies, pairs = tables
    # Dense as [B, Q, H, D], which is what a model wants next.
    out = q.new_empty((batch, queries, heads, width))
    grid = held.value_scales.stride()
    call = _CALL.pack(
        q.data_ptr(), out.data_ptr(),
        batch, heads, held.keys.shape[1], queries, width,
        strides[0] * size, strides[1] * size, strides[2] * size,
        TYPES[q.dtype], scale,
        frequencies, pairs, held.first, known.apart, TYPES[held.key_outliers.dtype],
        held.keys.data_ptr(), half, middle, *_side(held.keys, held.first_keys, key_table),
        0, width * 4, 0, *_tail(held.first_keys), coded, ONE_SPAN, width, kind, 0,
        _type(held.first_keys),
        held.values.data_ptr(), held.value_scales.data_ptr(), held.value_offsets.data_ptr(),
        *_side(held.values, held.first_values, value_table),
        grid[0] * 2, grid[1] * 2, 2, *_tail(held.first_values), coded, 1, 1, kind, 1,
        _type(held.first_values),
        *_apart(held.key_outliers, held.key_places),
        *_apart(held.value_outliers, held.value_places),
    )  # fmt: skip
    library = build.load().library
    assert library is not None, "`supports` asked"
    library.compresskit_bare_attention(call)
    return out.transpose(1, 2)


def extend(known: Known, held: Held, keys: torch.Tensor, values: torch.Tensor) -> Held:
    """As `kv_extend_bare`, without asking `extends` again."""
    note(EXTEND)
    batch, heads, tokens, width = keys.shape
    old, size, tables = held.keys.shape[2], keys.element_size(), known.tables
    assert tables is not None, "`extends` asked"
    key_table, value_table, middle, half, frequencies, pairs = tables
    k, v = keys.stride(), values.stride()
    # What a rollback has cut is copied before it is copied again: that is rare.
    before = [part if part.is_contiguous() else part.contiguous() for part in held[:8]]
    shape = batch, heads, old + tokens
    fresh = [torch.empty((*shape, part.shape[3]), dtype=part.dtype) for part in before]
    call = _ENCODE.pack(
        keys.data_ptr(), values.data_ptr(),
        k[0] * size, k[1] * size, k[2] * size, v[0] * size, v[1] * size, v[2] * size,
        batch, heads, old, tokens, width, KINDS[known.kind], TYPES[keys.dtype], known.apart,
        held.first + old, pairs, frequencies, middle, half, key_table, value_table,
        *[part.data_ptr() for part in before],
        *[part.data_ptr() for part in fresh],
    )  # fmt: skip
    library = build.load().library
    assert library is not None, "`extends` asked"
    library.compresskit_bare_encode(call)
    return Held._make((*fresh, held.first_keys, held.first_values))


def _side(codes: torch.Tensor, first: torch.Tensor | None, table: int) -> tuple[int, ...]:
    strides = codes.stride()
    tail = 0 if first is None else first.data_ptr()
    return tail, table, strides[0], strides[1], strides[2]


def _tail(first: torch.Tensor | None) -> tuple[int, int, int]:
    if first is None:
        return 0, 0, 0
    strides, size = first.stride(), first.element_size()
    return strides[0] * size, strides[1] * size, strides[2] * size


def _type(first: torch.Tensor | None) -> int:
    return 0 if first is None else TYPES[first.dtype]


def _apart(numbers: torch.Tensor, places: torch.Tensor) -> tuple[int, ...]:
    size, n, p = numbers.element_size(), numbers.stride(), places.stride()
    return numbers.data_ptr(), places.data_ptr(), n[0] * size, n[1] * size, p[0], p[1]
