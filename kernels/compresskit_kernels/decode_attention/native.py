"""Our own CPU attention for one token (`native/attention.cpp`): every key and value is read once."""

from __future__ import annotations

import ctypes

import torch

from compresskit_kernels.dispatch import Use, note
from compresskit_kernels.native import build

ATTEND = Use("decode_attention", "native: one token over a dense cache")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
NEEDS = (
    "one query token, float32 or bfloat16 tensors of one type with a head size that is a multiple "
    "of 32, on an x86 CPU with AVX-512 BF16, and a C++ compiler"
)


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch", "heads", "key_heads", "width", "length", "query_batch", "query_head",
                "key_batch", "key_head", "key_token", "value_batch", "value_head", "value_token",
            )
        ),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )  # fmt: skip


def runs() -> bool:
    """Whether this machine has it at all."""
    return build.available()


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the tensors are what the function reads."""
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and query.dtype in TYPES
        and query.dtype is key.dtype is value.dtype
        and query.shape[3] % 32 == 0
        and query.shape[3] == value.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and key.shape[2] > 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and build.available()
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend without asking `supports` again; out `[B, 1, H, D]`."""
    note(ATTEND)
    batch, heads, _, width = query.shape
    size = query.element_size()
    out = query.new_empty((batch, 1, heads, width))
    q, k, v = query.stride(), key.stride(), value.stride()
    call = _Call(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
        batch, heads, key.shape[1], width, key.shape[2],
        q[0] * size, q[1] * size,
        k[0] * size, k[1] * size, k[2] * size,
        v[0] * size, v[1] * size, v[2] * size,
        scale, TYPES[query.dtype],
    )  # fmt: skip
    library = build.load().library
    assert library is not None, "`supports` asked"
    library.compresskit_attention(ctypes.addressof(call))
    return out
