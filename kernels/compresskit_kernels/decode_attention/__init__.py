"""Attention of one new token over a dense cache.

    out[b, h] = sum_s softmax_s(scale * q[b, h] . k[b, h // (H / K), s]) * v[b, h // (H / K), s]

query `[B, H, 1, D]`, key and value `[B, K, S, D]` of one type, H a multiple of K, S at least 1; out
`[B, 1, H, D]` in their type. No mask: every token of the cache is seen.

`native` sums in float32 (bfloat16 products are exact there); `sdpa` is torch's
`scaled_dot_product_attention`, whose CPU path is made for long queries: for one token over 160 it
took 113 µs in bfloat16 where `native` takes 9 (9 query heads, 3 key/value heads, D 64, one Zen 5 core).

Paper: Vaswani et al. 2017, arXiv 1706.03762; Ainslie et al. 2023, GQA, arXiv 2305.13245.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from compresskit_kernels.decode_attention import native
from compresskit_kernels.dispatch import Use, note

if TYPE_CHECKING:
    import torch

SDPA = Use("decode_attention", "torch: scaled_dot_product_attention")


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend; `scale` is 1 / sqrt(D) by default.

    Raises:
        ValueError: `impl` is native and cannot take these tensors, or is not known.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if impl not in ("auto", "native", "sdpa"):
        raise ValueError(f"decode_attention: unknown implementation {impl!r}: auto, native, sdpa.")
    if impl != "sdpa" and native.supports(query, key, value):
        return native.attend(query, key, value, scale)
    if impl == "native":
        raise ValueError(f"decode_attention: 'native' needs {native.NEEDS}. Use 'auto'.")
    note(SDPA)
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(
        query, key, value, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()
