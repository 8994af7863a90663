"""Our CPU kernels (`native/coded_attention.cpp`, `native/encode.cpp`): every code is read once."""

from __future__ import annotations

import functools
import struct

import torch

from compresskit_kernels.dispatch import Use, note
from compresskit_kernels.kv_decode.cache import Rows, row_shapes
from compresskit_kernels.native import build

ATTEND = Use("kv_decode", "native: codes by tiles of 16 tokens")
EXTEND = Use("kv_extend", "native: encode behind a copy")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"int8": 0, "fp8": 1, "int4": 2, "int3": 3, "int2": 4}
WIDEST = 256
MOST_QUERIES = 8
NEEDS = (
    f"1 to {MOST_QUERIES} queries in float32 or bfloat16, rows of a multiple of 32 up to {WIDEST}, "
    "groups and spans of multiples of 16, on an x86 CPU with AVX-512 VBMI and BF16, and a C++ compiler"
)
# Fields as in the sources, 8 bytes each.
_SIDE = "5q3q3q3q6q"
_CALL = struct.Struct(f"=4q6q3q1q1d1q{_SIDE}{_SIDE}")
_ENCODE = struct.Struct("=7q3q9q2d2q")


def supports(q: torch.Tensor, keys: Rows, values: Rows) -> bool:
    """Whether the kernel reads these tensors."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and 1 <= q.shape[2] <= MOST_QUERIES
        and q.stride(3) == 1
        and q.shape[3] % 32 == 0
        and q.shape[3] <= WIDEST
        and keys.slots > 0
        and _readable(keys)
        and _readable(values)
        and build.available()
    )


def _readable(side: Rows) -> bool:
    width, groups, tail = side.width, side.groups, side.tail
    if side.span == 1:
        fits = width % groups == 0 and width // groups % 16 == 0
    else:
        fits = side.span % 16 == 0 and groups == width
    return (
        fits
        and side.dense
        and side.scales.dtype in TYPES
        and (side.offsets is None or side.offsets.dtype is side.scales.dtype)
        and _table_readable(side.table)
        and (tail is None or (tail.dtype in TYPES and tail.stride(3) == 1))
    )


def _table_readable(table: torch.Tensor | None) -> bool:
    return table is None or (table.dtype is torch.float32 and table.is_contiguous())


def attend(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """As `kv_decode`, without asking `supports` again."""
    return _attended(q, keys, values, lengths, mask, scale, 0)


def attend_turned(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    mask: torch.Tensor | None,
    scale: float,
    turn: torch.Tensor,
) -> torch.Tensor:
    """As `kv_decode_turned`, without asking whether the kernel reads these tensors."""
    return _attended(q, keys, values, None, mask, scale, turn.data_ptr())


def _attended(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    turn: int,
) -> torch.Tensor:
    note(ATTEND)
    batch, heads, queries, width = q.shape
    size = q.element_size()
    # Dense as [B, Q, H, D], which is what a model wants next.
    out = q.new_empty((batch, queries, heads, width))
    if mask is not None:
        mask = mask.contiguous()
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    strides = q.stride()
    call = _CALL.pack(
        q.data_ptr(),
        out.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        batch, heads, keys.codes.shape[1], queries, width, keys.slots,
        strides[0] * size, strides[1] * size, strides[2] * size,
        TYPES[q.dtype],
        scale,
        turn,
        *_fields(keys),
        *_fields(values),
    )  # fmt: skip
    library = build.load().library
    assert library is not None, "`supports` asked"
    library.compresskit_coded_attention(call)
    return out.transpose(1, 2)


def _fields(side: Rows) -> tuple[int, ...]:
    codes, scales, tail, table = side.codes, side.scales, side.tail, side.table
    code_strides, scale_strides = codes.stride(), scales.stride()
    size = scales.element_size()
    steps, tail_type = (0, 0, 0), 0
    if tail is not None:
        strides, each = tail.stride(), tail.element_size()
        steps = strides[0] * each, strides[1] * each, strides[2] * each
        tail_type = TYPES[tail.dtype]
    return (
        codes.data_ptr(),
        scales.data_ptr(),
        0 if side.offsets is None else side.offsets.data_ptr(),
        0 if tail is None else tail.data_ptr(),
        0 if table is None else table.data_ptr(),
        code_strides[0], code_strides[1], code_strides[2],
        scale_strides[0] * size, scale_strides[1] * size, scale_strides[2] * size,
        *steps,
        codes.shape[2], side.span, side.groups, KINDS[side.kind],
        TYPES[scales.dtype], tail_type,
    )  # fmt: skip


def encodes(old: Rows, x: torch.Tensor, group: int) -> bool:
    """Whether `extend` takes these tensors."""
    return (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and x.stride(3) == 1
        and x.shape[3] % 32 == 0
        and x.shape[3] <= WIDEST
        and group % 16 == 0
        and old.scales.dtype in TYPES
        and old.codes.is_contiguous()
        and old.scales.is_contiguous()
        and _table_readable(old.table)
        and (old.offsets is None or old.offsets.is_contiguous())
        and build.available()
    )


def extend(old: Rows, x: torch.Tensor, group: int) -> Rows:
    """As `kv_extend`, without asking `encodes` again."""
    return _extended(old, x, group, 0, 0)


def extend_turned(old: Rows, x: torch.Tensor, turn: torch.Tensor) -> Rows:
    """As `kv_extend_turned`, without asking `encodes` again."""
    assert old.table is not None, "asked for"
    return _extended(old, x, x.shape[3], turn.data_ptr(), old.table.data_ptr())


def _extended(old: Rows, x: torch.Tensor, group: int, turn: int, table: int) -> Rows:
    note(EXTEND)
    batch, heads, tokens, width = x.shape
    before, dtype = old.coded, old.scales.dtype
    made = [
        torch.empty((batch, heads, before + tokens, last), dtype=kind)
        for last, kind in row_shapes(old.kind, width, width // group, dtype)[: len(old.tensors())]
    ]
    strides, size = x.stride(), x.element_size()
    pointers = [held.data_ptr() for held in old.tensors().values()]
    fresh = [held.data_ptr() for held in made]
    if len(made) == 2:
        pointers.append(0)
        fresh.append(0)
    call = _ENCODE.pack(
        x.data_ptr(), *pointers, *fresh,
        strides[0] * size, strides[1] * size, strides[2] * size,
        batch, heads, before, tokens, width, group,
        TYPES[x.dtype], KINDS[old.kind], TYPES[dtype],
        *_range(dtype),
        turn, table,
    )  # fmt: skip
    library = build.load().library
    assert library is not None, "`encodes` asked"
    library.compresskit_encode(call)
    return Rows(old.kind, made[0], made[1], made[2] if len(made) > 2 else None, old.table)


@functools.cache
def _range(dtype: torch.dtype) -> tuple[float, float]:
    limits = torch.finfo(dtype)
    return float(limits.tiny), float(limits.max)
