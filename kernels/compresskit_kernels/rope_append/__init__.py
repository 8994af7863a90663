"""Rotate queries and keys, quantise keys and values, and write them into a cache: one launch.

    rotated[j]       = x[j] * cos[j] - x[j + P/2] * sin[j]              j < P/2
    rotated[j + P/2] = x[j + P/2] * cos[j + P/2] + x[j] * sin[j + P/2]
    rotated[j]       = x[j]                                             j >= P

for each head of q and k, with P the width of cos and sin, in float32; then the rows of keys and
values of token t go to slot starts[b] + t, quantised as `kv_decode.cache.quantise` does with the
cache's own kind, groups and type of scales. The keys are not rounded to the model's type first.

q `[B, H, T, D]`, k and v `[B, K, T, D]` float32, bfloat16 or float16; cos and sin `[B or 1, T, P]`
as transformers makes them (any scaling of positions included). Returns the rotated queries in the
type of q; the cache is changed in place.

Papers: Su et al. 2021, RoFormer, arXiv 2104.09864; Liu et al. 2024, KIVI, arXiv 2402.02750 (the
asymmetric 4-bit grid).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from compresskit_kernels.dispatch import Way, choose_way
from compresskit_kernels.rope_append import reference

if TYPE_CHECKING:
    import torch

    from compresskit_kernels.kv_decode.cache import Rows


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Rows,
    values: Rows,
    starts: torch.Tensor,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Write T tokens into `keys` and `values` (changed in place); return the rotated queries.

    Args:
        q: queries `[B, H, T, D]`.
        k: keys `[B, K, T, D]`, not yet rotated.
        v: values `[B, K, T, D]`.
        cos: cosines `[B or 1, T, P]`, P even and at most D.
        sin: sines, as the cosines.
        keys: cache of B sequences, K heads and any number of slots.
        values: as the keys.
        starts: int32 or int64 `[B]`, the slot of each sequence's first new token. On a GPU, where
            looking would cost a synchronisation, tokens beyond the capacity are dropped.
        impl: `auto`, `triton` or `reference`.

    Raises:
        ValueError: shapes that do not fit, tokens beyond the capacity (on a CPU), or an explicit
            choice that cannot run.
        LookupError: an unknown `impl`.
    """
    check(q, k, v, cos, sin, keys, values, starts)
    run = choose_way("rope_append", WAYS, impl, q, cos, keys, values)
    return run(q, k, v, cos, sin, keys, values, starts)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Rows,
    values: Rows,
    starts: torch.Tensor,
) -> None:
    """Raise ValueError unless the shapes fit together."""
    if k.dim() != 4 or k.shape != v.shape or q.dim() != 4 or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"rope_append: queries {list(q.shape)}, keys {list(k.shape)} and values "
            f"{list(v.shape)} should be [B, H, T, D], [B, K, T, D] and [B, K, T, D]."
        )
    batch, heads, tokens, width = k.shape
    for side in (keys, values):
        if side.codes.shape[:2] != (batch, heads) or side.width != width:
            raise ValueError(
                f"rope_append: a cache of {side.codes.shape[0]} sequences, {side.codes.shape[1]} "
                f"heads and rows of {side.width} does not take keys {list(k.shape)}."
            )
        if not side.plain:
            raise ValueError(
                "rope_append: rows with a table, a tail or scales of several tokens cannot be "
                "written one token at a time; use kv_decode.quantise."
            )
    turned = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[0] not in (1, batch) or cos.shape[1:-1] != (tokens,):
        raise ValueError(
            f"rope_append: cosines {list(cos.shape)} and sines {list(sin.shape)} should be "
            f"[{batch} or 1, {tokens}, P]."
        )
    if turned % 2 or turned > width:
        raise ValueError(
            f"rope_append: {turned} rotated numbers, which should be even and at most {width}."
        )
    if starts.shape != (batch,):
        raise ValueError(f"rope_append: starts {list(starts.shape)} should be [{batch}].")
    if starts.device.type == "cpu" and batch and tokens:
        low, high = int(starts.min()), int(starts.max()) + tokens
        if low < 0 or high > min(keys.slots, values.slots):
            raise ValueError(
                f"rope_append: slots {low} to {high - 1} of a cache with room for "
                f"{min(keys.slots, values.slots)}; make it larger."
            )


def _supports(q: torch.Tensor, cos: torch.Tensor, keys: Rows, values: Rows) -> bool:
    return q.is_cuda and find_spec("triton") is not None and fits(q, cos, keys, values)


def fits(q: torch.Tensor, cos: torch.Tensor, keys: Rows, values: Rows) -> bool:
    """Whether the Triton kernel is written for these shapes and types, on whatever device."""
    return (
        str(q.dtype).removeprefix("torch.") in ("bfloat16", "float16", "float32")
        and q.shape[-1] in (32, 64, 128, 256)
        and cos.shape[-1] == q.shape[-1]
        and all(side.groups <= (2 if side.kind == "int4" else 1) for side in (keys, values))
        and all(side.halves for side in (keys, values))
        and all(side.dense and side.scales.stride(2) > 0 for side in (keys, values))
        and 0 not in q.shape
    )


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Rows,
    values: Rows,
    starts: torch.Tensor,
) -> torch.Tensor:
    from compresskit_kernels.rope_append import triton

    return triton.append(q, k, v, cos, sin, keys, values, starts)


WAYS = (
    Way(
        "triton",
        "a CUDA device, triton, float32, bfloat16 or float16 rows of 32, 64, 128 or 256 that are "
        "rotated in full, and a cache with one scale a row of its own (int4: one or two)",
        _supports,
        _triton,
    ),
    Way("reference", "floating-point rows", reference.supports, reference.append),
)

__all__ = ["WAYS", "rope_append"]
