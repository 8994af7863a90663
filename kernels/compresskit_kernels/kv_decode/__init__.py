"""Attention of a few new tokens over a quantised cache of keys and values.

    score[h, i, s] = scale * sum_d q[h, i, d] * key[h // (H/K), s, d]
    out[h, i, d]   = sum_s softmax_s(score[h, i, :])[s] * value[h // (H/K), s, d]

over the slots s that query i may see: s <= length - Q + i (the new tokens are the last of the
cache, so that a verification of drafted tokens is causal among them) and mask[s]. A query that
sees nothing gets zeros. Keys and values as in `cache.Rows`, of one kind or of two; they may have
different numbers of coded rows, if those and the tails add up to the same.

q `[B, H, Q, D]` float32, bfloat16 or float16, H a multiple of K; out of the same shape and type.

Error against float64 on the same codes: `reference` (torch, a stretch of the cache at a time) and
`native` (C++ for CPUs, a tile of 16 tokens at a time) compute in float32. The Triton kernel rounds
the weights of the values to the type of q, relative 2^-9 for bfloat16 and 2^-12 for float16, and
accumulates in float32.

Papers: Dao et al. 2023, Flash-Decoding (the split over the context); Dao et al. 2022,
FlashAttention, arXiv 2205.14135 (the running softmax); Liu et al. 2024, KIVI, arXiv 2402.02750.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from compresskit_kernels.dispatch import Way, choose_way
from compresskit_kernels.kv_decode import native, reference
from compresskit_kernels.kv_decode.cache import Kind, Rows, empty, quantise, quantise_to

if TYPE_CHECKING:
    import torch

MOST_QUERIES = 8
"""Largest Q of the kernels that read codes."""


def kv_decode(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    *,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend with q `[B, H, Q, D]` over the cache; return `[B, H, Q, D]` in the type of q.

    Args:
        q: queries of the Q newest tokens, rotated already.
        keys: their own and all older keys; slots from 0.
        values: as the keys.
        lengths: int32 or int64 `[B]`, filled slots per sequence, new tokens included; all if None.
        mask: bool `[B, S]`, slots that may be seen at all (left padding, evicted tokens).
        scale: factor of the scores; 1 / sqrt(D) if None.
        impl: `auto`, `triton`, `native` or `reference`.

    Raises:
        ValueError: shapes that do not fit, or an explicit choice that cannot run.
        LookupError: an unknown `impl`.
    """
    check(q, keys, values, lengths, mask)
    run = choose_way("kv_decode", WAYS, impl, q, keys, values)
    return run(q, keys, values, lengths, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def check(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the shapes fit together."""
    batch, heads, slots = *keys.codes.shape[:2], keys.slots
    if (*values.codes.shape[:2], values.slots) != (
        batch,
        heads,
        slots,
    ) or values.width != keys.width:
        raise ValueError(
            f"kv_decode: keys [{batch}, {heads}, {slots}, {keys.width}] and values "
            f"{[*values.codes.shape[:2], values.slots, values.width]} differ in shape."
        )
    if q.dim() != 4 or q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != keys.width:
        raise ValueError(
            f"kv_decode: queries {list(q.shape)} do not fit a cache of {batch} sequences, {heads} "
            f"heads and rows of {keys.width}; the query heads must be a multiple of the cache's."
        )
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"kv_decode: lengths {list(lengths.shape)} should be [{batch}].")
    if mask is not None and mask.shape != (batch, slots):
        raise ValueError(f"kv_decode: the mask {list(mask.shape)} should be [{batch}, {slots}].")


def _supports(q: torch.Tensor, keys: Rows, values: Rows) -> bool:
    return q.is_cuda and find_spec("triton") is not None and fits(q, keys, values)


def fits(q: torch.Tensor, keys: Rows, values: Rows) -> bool:
    """Whether the Triton kernel is written for these shapes and types, on whatever device."""
    return (
        str(q.dtype).removeprefix("torch.") in ("bfloat16", "float16", "float32")
        and 1 <= q.shape[2] <= MOST_QUERIES
        and q.shape[2] * q.shape[1] // max(1, keys.codes.shape[1]) <= min(128, 16384 // keys.width)
        and keys.width in (32, 64, 128, 256)
        and all(side.groups <= (2 if side.kind == "int4" else 1) for side in (keys, values))
        and all(side.halves for side in (keys, values))
        and 0 not in (*q.shape, keys.slots)
    )


def _triton(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    from compresskit_kernels.kv_decode import triton

    return triton.attend(q, keys, values, lengths, mask, scale)


def kv_extend(old: Rows, x: torch.Tensor, *, group: int | None = None, impl: str = "auto") -> Rows:
    """Return `old`, rows without a span, a table or a tail, followed by `quantise`d rows x.

    Args:
        old: `[B, K, S, D]`; of `empty(kind, (B, K, 0, D))` in the beginning.
        x: `[B, K, T, D]`, floating-point.
        group: numbers that share a scale; D if None.
        impl: `auto`, `native` or `reference`; both give the same bits.

    Raises:
        ValueError: shapes that do not fit, or an explicit choice that cannot run.
        LookupError: an unknown `impl`.
    """
    group = group or x.shape[-1]
    if not old.plain:
        raise ValueError(
            "kv_extend: rows with a table, a tail or scales of several tokens do not grow."
        )
    if old.width != x.shape[-1] or x.shape[-1] != group * old.groups:
        raise ValueError(
            f"kv_extend: rows of {x.shape[-1]} numbers in groups of {group} do not follow rows of "
            f"{old.width} with {old.groups} scales each."
        )
    run = choose_way("kv_extend", EXTENDING, impl, x, old, group)
    return run(old, x, group)


EXTENDING = (
    Way("native", native.NEEDS, lambda x, old, group: native.encodes(old, x, group), native.extend),
    Way("reference", "floating-point rows", reference.supports, reference.extend),
)

WAYS = (
    Way(
        "triton",
        f"a CUDA device, triton, 1 to {MOST_QUERIES} queries in float32, bfloat16 or float16, rows "
        "of 32, 64, 128 or 256 in int8, fp8 or int4 without a table or a tail, one scale a row "
        "(int4: one or two), and at most 128 queries times query heads a kv head (64 with rows of "
        "256)",
        _supports,
        _triton,
    ),
    Way("native", native.NEEDS, native.supports, native.attend),
    Way("reference", "floating-point queries", reference.supports, reference.attend),
)

__all__ = ["WAYS", "Kind", "Rows", "empty", "kv_decode", "kv_extend", "quantise", "quantise_to"]
