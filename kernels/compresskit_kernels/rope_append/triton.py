"""One program a row: rotate it, find its scale, round it, store it.

    grid (sequence x token, H + 2K): the first H rows are queries, then come keys, then values

A row is held as its two halves, which are what a rotary embedding mixes and what the nibbles of an
int4 byte are, so that nothing moves between lanes. Divisions are rounded correctly and halves go to
even, as in the reference: the codes differ only where the compiler fused a multiply and an add of
the rotation. e4m3 is encoded by integer arithmetic, which is the same on every device.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from compresskit_kernels.dispatch import Use, note

if TYPE_CHECKING:
    from compresskit_kernels.kv_decode.cache import Rows

ROUTINE = Use("rope_append", "triton: rotate + quantise + write")


@triton.jit
def round_even(x: tl.tensor) -> tl.tensor:
    """Round to the nearest integer, halves to even, for |x| < 2^22."""
    # Adding 1.5 * 2^23 leaves no bits behind the point; the hardware rounds.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_e4m3(x: tl.tensor) -> tl.tensor:
    """Bytes of the nearest e4m3 numbers, halves to even, |x| at most 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Keep 3 bits of mantissa: add half of what is dropped (less one if even), shift, rebias.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 all numbers are multiples of 2^-9, the last place of a float32 next to 2^14.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _affine(
    x: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    TINY: tl.constexpr,
) -> tl.tensor:
    """Codes 0 to 15 of one group; stores its scale and offset."""
    stored = tl.maximum(tl.div_rn(high - low, 15.0), TINY).to(scales.dtype.element_ty)
    offset = low.to(offsets.dtype.element_ty)
    tl.store(scales, stored)
    tl.store(offsets, offset)
    step = tl.div_rn(x - offset.to(tl.float32), stored.to(tl.float32))
    return round_even(tl.minimum(tl.maximum(step, 0.0), 15.0))


@triton.jit
def _store(
    first: tl.tensor,
    second: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    TINY: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Quantise one row, given as halves, and write it."""
    at = codes + tl.arange(0, HALF)
    if KIND == "int4":
        low1 = tl.min(first, axis=0)
        low2 = tl.min(second, axis=0)
        high1 = tl.max(first, axis=0)
        high2 = tl.max(second, axis=0)
        if GROUPS == 1:
            low1 = tl.minimum(low1, low2)
            low2 = low1
            high1 = tl.maximum(high1, high2)
            high2 = high1
        code1 = _affine(first, low1, high1, scales, offsets, TINY).to(tl.uint8)
        # With one group the same numbers are stored twice.
        more = GROUPS - 1
        code2 = _affine(second, low2, high2, scales + more, offsets + more, TINY).to(tl.uint8)
        tl.store(at, code1 | (code2 << 4))
    else:
        LARGEST: tl.constexpr = 127.0 if KIND == "int8" else 448.0
        largest = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
        stored = tl.maximum(tl.div_rn(largest, LARGEST), TINY).to(scales.dtype.element_ty)
        tl.store(scales, stored)
        scale = stored.to(tl.float32)
        step1 = tl.minimum(tl.maximum(tl.div_rn(first, scale), -LARGEST), LARGEST)
        step2 = tl.minimum(tl.maximum(tl.div_rn(second, scale), -LARGEST), LARGEST)
        if KIND == "int8":
            tl.store(at, round_even(step1).to(tl.int8))
            tl.store(at + HALF, round_even(step2).to(tl.int8))
        else:
            tl.store(at, to_e4m3(step1))
            tl.store(at + HALF, to_e4m3(step2))


@triton.jit
def append_row(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    key_codes: tl.tensor,
    key_scales: tl.tensor,
    key_offsets: tl.tensor,
    value_codes: tl.tensor,
    value_scales: tl.tensor,
    value_offsets: tl.tensor,
    tokens: tl.tensor,
    q_heads: tl.tensor,
    kv_heads: tl.tensor,
    slots: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    table_batch: tl.tensor,
    table_token: tl.tensor,
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
    KEY_TINY: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_TINY: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """One row of one token: a query, a key or a value."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    half = tl.arange(0, HALF)
    slot = tl.load(starts + batch).to(tl.int64) + token
    fits = (slot >= 0) & (slot < slots)
    at = batch * table_batch + token * table_token + half
    if head < q_heads:
        from_row = q + batch * q_batch + head * q_head + token * q_token + half
        first = tl.load(from_row).to(tl.float32)
        second = tl.load(from_row + HALF).to(tl.float32)
        turned1 = first * tl.load(cos + at).to(tl.float32)
        turned1 -= second * tl.load(sin + at).to(tl.float32)
        turned2 = second * tl.load(cos + at + HALF).to(tl.float32)
        turned2 += first * tl.load(sin + at + HALF).to(tl.float32)
        to = out + ((batch * q_heads + head) * tokens + token) * (2 * HALF) + half
        tl.store(to, turned1.to(out.dtype.element_ty))
        tl.store(to + HALF, turned2.to(out.dtype.element_ty))
    elif head < q_heads + kv_heads:
        head -= q_heads
        if fits:
            from_row = k + batch * k_batch + head * k_head + token * k_token + half
            first = tl.load(from_row).to(tl.float32)
            second = tl.load(from_row + HALF).to(tl.float32)
            turned1 = first * tl.load(cos + at).to(tl.float32)
            turned1 -= second * tl.load(sin + at).to(tl.float32)
            turned2 = second * tl.load(cos + at + HALF).to(tl.float32)
            turned2 += first * tl.load(sin + at + HALF).to(tl.float32)
            scale_at = batch * ks_batch + head * ks_head + slot * ks_slot
            _store(
                turned1,
                turned2,
                key_codes + batch * kc_batch + head * kc_head + slot * kc_slot,
                key_scales + scale_at,
                key_offsets + scale_at,
                KEY,
                KEY_GROUPS,
                KEY_TINY,
                HALF,
            )
    else:
        head -= q_heads + kv_heads
        if fits:
            from_row = v + batch * v_batch + head * v_head + token * v_token + half
            scale_at = batch * vs_batch + head * vs_head + slot * vs_slot
            _store(
                tl.load(from_row).to(tl.float32),
                tl.load(from_row + HALF).to(tl.float32),
                value_codes + batch * vc_batch + head * vc_head + slot * vc_slot,
                value_scales + scale_at,
                value_offsets + scale_at,
                VALUE,
                VALUE_GROUPS,
                VALUE_TINY,
                HALF,
            )


def append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Rows,
    values: Rows,
    starts: torch.Tensor,
) -> torch.Tensor:
    """As `rope_append`."""
    note(ROUTINE)
    batch, heads, tokens, width = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty((batch, heads, tokens, width), dtype=q.dtype, device=q.device)
    append_row[(batch * tokens, heads + 2 * k.shape[1])](
        q,
        k,
        v,
        cos,
        sin,
        starts,
        out,
        *_pointers(keys),
        *_pointers(values),
        tokens,
        heads,
        k.shape[1],
        min(keys.slots, values.slots),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0),
        cos.stride(1),
        *keys.codes.stride()[:3],
        *keys.scales.stride()[:3],
        *values.codes.stride()[:3],
        *values.scales.stride()[:3],
        KEY=keys.kind,
        KEY_GROUPS=keys.groups,
        KEY_TINY=torch.finfo(keys.scales.dtype).tiny,
        VALUE=values.kind,
        VALUE_GROUPS=values.groups,
        VALUE_TINY=torch.finfo(values.scales.dtype).tiny,
        HALF=width // 2,
        num_warps=1,
    )
    return out


def _pointers(side: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = side.codes.view(torch.uint8) if side.kind == "fp8" else side.codes
    return codes, side.scales, side.scales if side.offsets is None else side.offsets
