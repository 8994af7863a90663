"""What this CPU and this torch can do, found by trying, once.

The packed matrix products are private operators of torch: they are vectorised for AVX2 and
AVX-512 and come with a layout of their own that follows the instruction set. So nothing here
trusts a version number: the layout is learnt by packing known codes, and a torch without the
operators simply has no fast path.
"""

from __future__ import annotations

import functools

import torch

ROWS = 64
"""Weight rows are padded to this: the widest block of the packed layout, a multiple of others."""


@functools.cache
def wide_dtype() -> torch.dtype:
    """Type for products of many rows: bfloat16 where the CPU multiplies it, else float32."""
    return torch.bfloat16 if _multiplies_bf16() else torch.float32


def narrow(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in bfloat16 and contiguous, as the packed products want it.

    The test by identity spares a call of torch in the usual case; this runs in every layer.
    """
    return (x if x.dtype is torch.bfloat16 else x.to(torch.bfloat16)).contiguous()


def like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `y` in the type of `x`."""
    return y if y.dtype is x.dtype else y.to(x.dtype)


def _multiplies_bf16() -> bool:
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(probe()) if probe is not None else False


@functools.cache
def has_int8_pack() -> bool:
    """Whether torch has a vectorised product of bfloat16 rows with int8 codes here."""
    return hasattr(torch, "_weight_int8pack_mm") and _vectorised()


@functools.cache
def int4_block() -> int | None:
    """Rows per block of torch's packed int4 layout here, or None when there is no fast path.

    A block of B rows is stored as [K, B/2] bytes: the low nibbles are its first B/2 rows, the
    high nibbles the rest. B is 64 with AVX-512 and 32 with AVX2; other layouts are not known and
    count as no fast path.
    """
    if not (hasattr(torch, "_convert_weight_to_int4pack_for_cpu") and _vectorised()):
        return None
    codes = torch.arange(ROWS * 32, dtype=torch.int32).mul(7).remainder(127).bitwise_and(15)
    codes = codes.reshape(ROWS, 32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (64, 32):
        if torch.equal(int4_codes(packed, block).transpose(1, 2).reshape(ROWS, 32).int(), codes):
            return block
    return None


def int4_codes(packed: torch.Tensor, block: int) -> torch.Tensor:
    """Undo the packing: uint8 `[N, K/2]` -> uint8 codes `[N/block, K, block]`."""
    rows, half_width = packed.shape
    pairs = packed.view(rows // block, half_width * 2, block // 2)
    return torch.cat((pairs & 15, pairs >> 4), dim=-1)


def _vectorised() -> bool:
    # Elsewhere the same operators run a scalar loop, several times slower than a dense product.
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
