"""Attention over keys coded without their rotary positions, outliers apart; and new rows for it.

    score[h, i, s] = scale * sum_d q[h, i, d] * key[h // (H/K), s, d]
    out[h, i, d]   = sum_s softmax_s(score[h, i, :])[s] * value[h // (H/K), s, d]

with keys and values as in `rows`; the queries are those of the newest Q tokens, causal among
themselves, and every other token is seen.

    kv_extend_bare   positions off ──► places of outliers, codes ──► behind the old rows
    kv_decode_bare   codes ──► numbers ──► outliers in place ──► positions on ──► attention

Error against float64: `reference` (torch, a stretch of the cache at a time) and `native` (C++ for
CPUs, a tile of 16 tokens at a time) compute in float32; only the result is rounded to the type of q.

Paper: Hooper et al. 2024, KVQuant, arXiv 2401.18079 (sections 3.1, 3.2 and 3.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit_kernels.dispatch import Way, choose_way
from compresskit_kernels.kv_bare import native, reference
from compresskit_kernels.kv_bare.rows import Held, Known

if TYPE_CHECKING:
    import torch

STRETCH = 1024
"""Slots that the reference decodes at a time: 8 heads of 128 in float32 are 4 MiB."""


def kv_decode_bare(
    q: torch.Tensor,
    known: Known,
    held: Held,
    *,
    scale: float | None = None,
    stretch: int = STRETCH,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend with q `[B, H, Q, D]` over the cache; return `[B, H, Q, D]` in the type of q.

    Args:
        q: queries of the Q newest tokens, with their positions.
        known: the levels and ranges of the layer.
        held: all rows, those of the new tokens included.
        scale: factor of the scores; 1 / sqrt(D) if None.
        stretch: slots that the reference decodes at a time.
        impl: `auto`, `native` or `reference`.

    Raises:
        ValueError: shapes that do not fit, or an explicit choice that cannot run.
        LookupError: an unknown `impl`.
    """
    heads, width = held.keys.shape[1], known.half.shape[-1]
    if q.shape[0] != held.keys.shape[0] or q.shape[1] % heads or q.shape[3] != width:
        raise ValueError(
            f"kv_decode_bare: queries {list(q.shape)} do not fit a cache of {held.keys.shape[0]} "
            f"sequences, {heads} heads and rows of {width}; the query heads must be a multiple of "
            "the cache's."
        )
    run = choose_way("kv_decode", DECODING, impl, q, known, held)
    return run(q, known, held, width**-0.5 if scale is None else scale, stretch)


def kv_extend_bare(
    known: Known, held: Held, keys: torch.Tensor, values: torch.Tensor, *, impl: str = "auto"
) -> Held:
    """Return `held` followed by the coded new rows; the first tokens stay what they are.

    Both implementations compute in float32, in another order: a number within rounding of the
    middle of two levels may get the one or the other, and of two that stand out alike either may.

    Args:
        known: the levels and ranges of the layer.
        held: of `Held.none` in the beginning.
        keys: `[B, K, T, D]`, floating-point, with the positions that follow those held.
        values: `[B, K, T, D]`, in the type of the keys.
        impl: `auto`, `native` or `reference`.

    Raises:
        ValueError: shapes that do not fit, or an explicit choice that cannot run.
        LookupError: an unknown `impl`.
    """
    width = known.half.shape[-1]
    if keys.shape != values.shape or keys.shape[-1] != width or keys.shape[:2] != held[0].shape[:2]:
        raise ValueError(
            f"kv_extend_bare: keys {list(keys.shape)} and values {list(values.shape)} do not follow "
            f"{list(held.keys.shape[:2])} sequences and heads of rows of {width}."
        )
    run = choose_way("kv_extend", EXTENDING, impl, keys, known, held, values)
    return run(known, held, keys, values)


DECODING = (
    Way("native", native.NEEDS, native.supports, native.attend),
    Way("reference", "floating-point queries", reference.supports, reference.attend),
)
EXTENDING = (
    Way("native", native.NEEDS, native.extends, native.extend),
    Way("reference", "floating-point rows", reference.supports, reference.extend),
)

__all__ = ["DECODING", "EXTENDING", "Held", "Known", "kv_decode_bare", "kv_extend_bare"]
