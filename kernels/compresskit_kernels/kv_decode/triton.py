"""Flash-decoding over codes: many programs share one context, a second kernel merges their parts.

    program (sequence and kv head, part)        program (row, 64 columns)
      for each BLOCK slots of the part:            weights = exp2(lse - max over the parts)
        scores  = (q . codes) * scale              out     = sum(weights * part) / sum(weights)
        running softmax
        acc    += (p * scale) . codes
      -> normalised part, log-sum-exp

The codes are never scaled one by one: a scale belongs to a row of keys, so it multiplies a score,
and to a row of values, so it joins the softmax weight. Small integers and e4m3 numbers are exact in
bfloat16 and float16, hence the products run on tensor cores without loss. All query heads of a kv
head and all new tokens are rows of the same product: the cache is read once. A row of D numbers is
handled as two halves of D/2 throughout, because that is what the nibbles of an int4 byte are.

A part is a share of the sequence's own length, not of the capacity, so that ragged batches stay
balanced and one CUDA graph serves every length.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from compresskit_kernels.dispatch import Use, note
from compresskit_kernels.kv_decode.cache import Rows

ROUTINE = Use("kv_decode", "triton: split over the context + merge")

MOST_PARTS = 64
SHORTEST_PART = 256
"""Slots below which another program costs more than it saves."""
REGISTERS = 65536
"""Of a multiprocessor; they decide how many programs it runs at once."""
MERGED = 64
"""Columns of a program that merges."""
LOG2E = 1.4426950408889634


@triton.jit
def _halves(
    codes: tl.tensor,
    slots: tl.tensor,
    keep: tl.tensor,
    stride: tl.tensor,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    HAS_FP8: tl.constexpr,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of some rows of codes, `[slots, HALF]` each, in dtype; int4 still from 0 to 15."""
    at = codes + slots[:, None] * stride + tl.arange(0, HALF)[None, :]
    first = tl.load(at, mask=keep[:, None], other=0)
    if KIND == "int4":
        return (first & 15).to(tl.int8).to(dtype), (first >> 4).to(tl.int8).to(dtype)
    second = tl.load(at + HALF, mask=keep[:, None], other=0)
    if KIND == "fp8":
        return _e4m3(first, HAS_FP8, dtype), _e4m3(second, HAS_FP8, dtype)
    return first.to(dtype), second.to(dtype)


@triton.jit
def _grid(
    scales: tl.tensor,
    offsets: tl.tensor,
    slots: tl.tensor,
    keep: tl.tensor,
    stride: tl.tensor,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Scales of the two halves of some rows, and their offsets (int4 only; else anything)."""
    at = slots * stride
    scale = tl.load(scales + at, mask=keep, other=0.0).to(tl.float32)
    if KIND == "int4":
        offset = tl.load(offsets + at, mask=keep, other=0.0).to(tl.float32)
        if GROUPS == 2:
            scale2 = tl.load(scales + at + 1, mask=keep, other=0.0).to(tl.float32)
            offset2 = tl.load(offsets + at + 1, mask=keep, other=0.0).to(tl.float32)
            return scale, scale2, offset, offset2
        return scale, scale, offset, offset
    return scale, scale, scale, scale


@triton.jit
def _keep(mask: tl.tensor, slots: tl.tensor, end: tl.tensor, HAS_MASK: tl.constexpr) -> tl.tensor:
    """Slots that exist and may be seen."""
    keep = slots < end
    if HAS_MASK:
        keep = keep & (tl.load(mask + slots, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _e4m3(code: tl.tensor, HAS_FP8: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Read e4m3 numbers from bytes; where the GPU has no such type, as float16 numbers / 256."""
    if HAS_FP8:
        return code.to(tl.float8e4nv, bitcast=True).to(dtype)
    # Sign, exponent and mantissa moved to their places in float16; the exponents' biases differ by 8.
    wide = code.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return (half * 256.0).to(dtype)


@triton.jit
def _scaled(
    weights: tl.tensor, scales: tl.tensor, codes: tl.tensor, dtype: tl.constexpr
) -> tl.tensor:
    """(weights * scales) . codes, float32 `[rows, HALF]`."""
    if dtype == tl.float16:
        # Small scales would leave float16's normal range; take the largest out.
        largest = tl.maximum(tl.max(scales, axis=0), 1e-30)
        return tl.dot((weights * (scales / largest)[None, :]).to(dtype), codes) * largest
    if dtype == tl.float32:
        return tl.dot(weights * scales[None, :], codes, input_precision="ieee")
    return tl.dot((weights * scales[None, :]).to(dtype), codes)


@triton.jit
def _dot(q: tl.tensor, codes: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Product of queries and codes over D, float32 `[rows, slots]`."""
    if dtype == tl.float32:
        return tl.dot(q, tl.trans(codes), input_precision="ieee")
    return tl.dot(q, tl.trans(codes))


@triton.jit
def attend_part(
    q: tl.tensor,
    key_codes: tl.tensor,
    key_scales: tl.tensor,
    key_offsets: tl.tensor,
    value_codes: tl.tensor,
    value_scales: tl.tensor,
    value_offsets: tl.tensor,
    lengths: tl.tensor,
    mask: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    factor: tl.tensor,
    heads: tl.tensor,
    slots: tl.tensor,
    parts: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    kc_batch: tl.tensor,
    kc_head: tl.tensor,
    kc_slot: tl.tensor,
    ks_batch: tl.tensor,
    ks_head: tl.tensor,
    ks_slot: tl.tensor,
    vc_batch: tl.tensor,
    vc_head: tl.tensor,
    vc_slot: tl.tensor,
    vs_batch: tl.tensor,
    vs_head: tl.tensor,
    vs_slot: tl.tensor,
    KEY: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    SHARE: tl.constexpr,  # query heads of a kv head
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,  # SHARE * QUERIES, filled up to what tl.dot takes
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FP8: tl.constexpr,
) -> None:
    """One part of one kv head's context: normalised `out` and base-2 `lse` of the part."""
    pair = tl.program_id(0)
    part = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty

    row = tl.arange(0, ROWS)
    token = row % QUERIES
    real = row < SHARE * QUERIES
    half = tl.arange(0, HALF)
    from_q = q + batch * q_batch + (head * SHARE + row // QUERIES)[:, None] * q_head
    from_q += token[:, None] * q_token + half[None, :]
    q_first = tl.load(from_q, mask=real[:, None], other=0.0)
    q_second = tl.load(from_q + HALF, mask=real[:, None], other=0.0)
    if KEY == "int4":
        sum_first = tl.sum(q_first.to(tl.float32), axis=1)
        sum_second = tl.sum(q_second.to(tl.float32), axis=1)

    key_codes += batch * kc_batch + head * kc_head
    key_scales += batch * ks_batch + head * ks_head
    key_offsets += batch * ks_batch + head * ks_head
    value_codes += batch * vc_batch + head * vc_head
    value_scales += batch * vs_batch + head * vs_head
    value_offsets += batch * vs_batch + head * vs_head
    mask += batch * slots
    length = slots
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + batch).to(tl.int32), slots)
    share = tl.cdiv(tl.cdiv(length, parts), BLOCK) * BLOCK
    begin = part * share
    end = tl.minimum(begin + share, length)

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    shift_first = tl.zeros([ROWS], tl.float32)
    shift_second = tl.zeros([ROWS], tl.float32)
    acc_first = tl.zeros([ROWS, HALF], tl.float32)
    acc_second = tl.zeros([ROWS, HALF], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keep = _keep(mask, at, end, HAS_MASK)
        ks1, ks2, ko1, ko2 = _grid(key_scales, key_offsets, at, keep, ks_slot, KEY, KEY_GROUPS)
        vs1, vs2, vo1, vo2 = _grid(
            value_scales, value_offsets, at, keep, vs_slot, VALUE, VALUE_GROUPS
        )

        first, second = _halves(key_codes, at, keep, kc_slot, KEY, HALF, HAS_FP8, dtype)
        if KEY == "int4":
            scores = _dot(q_first, first, dtype) * ks1[None, :]
            scores += _dot(q_second, second, dtype) * ks2[None, :]
            scores += sum_first[:, None] * ko1[None, :]
            scores += sum_second[:, None] * ko2[None, :]
        else:
            scores = _dot(q_first, first, dtype) + _dot(q_second, second, dtype)
            scores *= ks1[None, :]
        # Causal among the new tokens, which are the last of the sequence.
        seen = keep[None, :] & (at[None, :] <= (length - QUERIES + token)[:, None])
        scores = tl.where(seen, scores * factor, -float("inf"))

        higher = tl.maximum(top, tl.max(scores, axis=1))
        level = tl.where(higher == -float("inf"), 0.0, higher)  # no inf - inf
        kept = tl.exp2(top - level)
        weights = tl.exp2(scores - level[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        top = higher

        first, second = _halves(value_codes, at, keep, vc_slot, VALUE, HALF, HAS_FP8, dtype)
        acc_first = acc_first * kept[:, None] + _scaled(weights, vs1, first, dtype)
        acc_second = acc_second * kept[:, None] + _scaled(weights, vs2, second, dtype)
        if VALUE == "int4":
            shift_first = shift_first * kept + tl.sum(weights * vo1[None, :], axis=1)
            shift_second = shift_second * kept + tl.sum(weights * vo2[None, :], axis=1)

    below = tl.where(total == 0.0, 1.0, total)
    rows = (pair.to(tl.int64) * parts + part) * (SHARE * QUERIES) + row
    to = out + rows[:, None] * (2 * HALF) + half[None, :]
    acc_first = (acc_first + shift_first[:, None]) / below[:, None]
    acc_second = (acc_second + shift_second[:, None]) / below[:, None]
    tl.store(to, acc_first.to(out.dtype.element_ty), mask=real[:, None])
    tl.store(to + HALF, acc_second.to(out.dtype.element_ty), mask=real[:, None])
    logarithm = tl.where(total == 0.0, -float("inf"), top + tl.log2(below))
    tl.store(lse + rows, logarithm, mask=real)


@triton.jit
def merge_parts(
    partial: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,  # SHARE * QUERIES
    PARTS: tl.constexpr,  # parts, filled up to a power of two
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Weigh the parts of one row by their sums."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    at = (row // ROWS * parts + part) * ROWS + row % ROWS
    logarithm = tl.load(lse + at, mask=part < parts, other=-float("inf"))
    top = tl.max(logarithm, axis=0)
    weights = tl.exp2(logarithm - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    from_part = partial + at[:, None] * WIDTH + column[None, :]
    values = tl.load(from_part, mask=(part < parts)[:, None], other=0.0)
    merged = tl.sum(values * weights[:, None], axis=0)
    tl.store(out + row * WIDTH + column, merged.to(out.dtype.element_ty))


def attend(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    parts: int | None = None,
) -> torch.Tensor:
    """As `kv_decode`; `parts` overrides the number of programs that share a context."""
    note(ROUTINE)
    batch, heads, queries, width = q.shape
    kv_heads, slots = keys.codes.shape[1], keys.slots
    rows = heads // kv_heads * queries
    if q.stride(-1) != 1:
        q = q.contiguous()
    keys, values = _plain(keys), _plain(values)
    options = configuration(width, rows)
    threads = 32 * options["num_warps"]
    at_once = REGISTERS // (threads * options["maxnreg"]) * _processors(q.device)
    parts = parts or max(1, min(at_once // (batch * kv_heads), slots // SHORTEST_PART, MOST_PARTS))
    out = torch.empty((batch, heads, queries, width), dtype=q.dtype, device=q.device)
    # One part needs no merging and writes the result; its log-sum-exp is dropped.
    kind = q.dtype if parts == 1 else torch.float32
    partial = out if parts == 1 else q.new_empty((batch * kv_heads, parts, rows, width), dtype=kind)
    lse = q.new_empty((batch * kv_heads, parts, rows), dtype=torch.float32)
    attend_part[(batch * kv_heads, parts)](
        q,
        *_pointers(keys),
        *_pointers(values),
        q if lengths is None else lengths,
        q if mask is None else mask.contiguous().view(torch.uint8),
        partial,
        lse,
        scale * LOG2E,
        kv_heads,
        slots,
        parts,
        *q.stride()[:3],
        *keys.codes.stride()[:3],
        *keys.scales.stride()[:3],
        *values.codes.stride()[:3],
        *values.scales.stride()[:3],
        KEY=keys.kind,
        KEY_GROUPS=keys.groups,
        VALUE=values.kind,
        VALUE_GROUPS=values.groups,
        SHARE=heads // kv_heads,
        QUERIES=queries,
        ROWS=max(16, triton.next_power_of_2(rows)),
        HALF=width // 2,
        HAS_LENGTHS=lengths is not None,
        HAS_MASK=mask is not None,
        HAS_FP8=_has_fp8(q.device),
        **options,
    )
    if parts > 1:
        merge_parts[(batch * heads * queries, triton.cdiv(width, MERGED))](
            partial,
            lse,
            out,
            parts,
            ROWS=rows,
            PARTS=triton.next_power_of_2(parts),
            WIDTH=width,
            BLOCK=min(MERGED, width),
            num_warps=4,
        )
    return out


def configuration(width: int, rows: int) -> dict[str, int]:
    """Slots of a step, warps, pipeline stages and registers a thread, for D and the query rows.

    Chosen without a GPU: the widest steps whose registers fit (see `testing.spills`), three
    programs of four warps on a multiprocessor where the rows are few. The registers are bounded by
    hand, because the compiler would rather spill a little and run a fourth.
    """
    if rows > 32:
        block = 16 if rows > 64 or width > 128 else 32
        return {"BLOCK": block, "num_warps": 8, "num_stages": 2, "maxnreg": 255}
    if rows > 16:
        if width > 128:
            return {"BLOCK": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 255}
        return {"BLOCK": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 255}
    if width > 128:
        return {"BLOCK": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 168}
    stages = 4 if width <= 64 else 3
    return {"BLOCK": 64, "num_warps": 4, "num_stages": stages, "maxnreg": 168}


def _pointers(side: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = side.codes.view(torch.uint8) if side.kind == "fp8" else side.codes
    return codes, side.scales, side.scales if side.offsets is None else side.offsets


def _plain(side: Rows) -> Rows:
    """Rows as the kernel reads them."""
    if side.dense:
        return side
    offsets = None if side.offsets is None else side.offsets.contiguous()
    return Rows(side.kind, side.codes.contiguous(), side.scales.contiguous(), offsets)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
