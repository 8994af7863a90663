"""Rows that are turned before they are coded, as levels of a table; and attention over such rows.

    y = x @ turn          a rotation: whatever x is like, the numbers of y look normal
    scale = |y| / sqrt(D)
    code = index of the level of the table nearest to y / scale

    attention    q @ turn ──► over the codes ──► out @ turn^T

A rotation keeps products, so rows are never turned back: `kv_decode_turned` is `kv_decode` between
two small products, which the native kernel takes in itself. It turns in float32 and rounds the
result alone; the Triton way rounds the turned queries to their type as well.

Paper: Zandieh et al. 2025, TurboQuant, arXiv 2504.19874 (algorithm 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compresskit_kernels.dispatch import Way, choose_way, note
from compresskit_kernels.kv_decode import WAYS as DECODING, check, native, reference
from compresskit_kernels.kv_decode.planes import level_codes, pack

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit_kernels.kv_decode.cache import Rows

    Attend = Callable[..., torch.Tensor]


def kv_extend_turned(old: Rows, x: torch.Tensor, turn: torch.Tensor, *, impl: str = "auto") -> Rows:
    """Return `old`, rows with a table and one scale each, followed by the turned and coded rows x.

    Both implementations sum in float32, in another order: a number within rounding of the middle of
    two levels may get the one or the other.

    Args:
        old: `[B, K, S, D]`, S may be 0.
        x: `[B, K, T, D]`, floating-point.
        turn: float32 `[D, D]`.
        impl: `auto`, `native` or `reference`.

    Raises:
        ValueError: shapes that do not fit, or an explicit choice that cannot run.
        LookupError: an unknown `impl`.
    """
    width = x.shape[-1]
    if old.table is None or old.groups != 1 or old.span != 1 or old.tail is not None:
        raise ValueError("kv_extend_turned: old rows need a table and one scale each, and no tail.")
    if old.width != width or turn.shape != (width, width):
        raise ValueError(
            f"kv_extend_turned: rows of {width} numbers do not follow rows of {old.width} numbers "
            f"turned by {list(turn.shape)}."
        )
    run = choose_way("kv_extend", EXTENDING, impl, x, old, turn)
    return run(old, x, turn)


def kv_decode_turned(
    q: torch.Tensor,
    keys: Rows,
    values: Rows,
    turn: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return `kv_decode(q @ turn, keys, values, ...) @ turn^T`, `[B, H, Q, D]` in the type of q.

    Args:
        q: `[B, H, Q, D]`, as the model has them.
        keys: turned rows; see `kv_decode`.
        values: as the keys.
        turn: orthogonal, float32 `[D, D]`.
        mask: as of `kv_decode`.
        scale: as of `kv_decode`.
        impl: `auto`, `triton`, `native` or `reference`.

    Raises:
        ValueError: shapes that do not fit, or an explicit choice that cannot run.
        LookupError: an unknown `impl`.
    """
    check(q, keys, values, None, mask)
    width = q.shape[-1]
    if turn.shape != (width, width):
        raise ValueError(
            f"kv_decode_turned: {list(turn.shape)} does not turn rows of {width} numbers."
        )
    run = choose_way("kv_decode", TURNED, impl, q, keys, values, turn)
    return run(q, keys, values, mask, width**-0.5 if scale is None else scale, turn)


def scaled(turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms `[..., 1]` of rows `[..., D]` in float32, and the rows over norm / sqrt(D)."""
    # The smallest normal number stands in for the length of a row of zeros.
    length = turned.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return length, turned / (length / turned.shape[-1] ** 0.5)


def _reference(old: Rows, x: torch.Tensor, turn: torch.Tensor) -> Rows:
    note(reference.EXTEND)
    assert old.table is not None, "asked for"
    length, unit = scaled(x.float() @ turn)
    codes = pack(level_codes(unit, old.table), old.kind)
    scales = (length / x.shape[-1] ** 0.5).to(old.scales.dtype)
    return replace(
        old, codes=torch.cat((old.codes, codes), 2), scales=torch.cat((old.scales, scales), 2)
    )


def _native(old: Rows, x: torch.Tensor, turn: torch.Tensor) -> Rows:
    return native.extend_turned(old, x, turn)


def _fits(x: torch.Tensor, old: Rows, turn: torch.Tensor) -> bool:
    return _dense(turn) and native.encodes(old, x, x.shape[-1])


def _dense(turn: torch.Tensor) -> bool:
    """Whether a kernel can read the matrix by rows."""
    return turn.dtype is torch.float32 and turn.is_contiguous() and turn.device.type == "cpu"


EXTENDING = (
    Way("native", native.NEEDS, _fits, _native),
    Way(
        "reference",
        "floating-point rows",
        lambda x, old, turn: x.is_floating_point(),
        _reference,
    ),
)


def _around(way: Way[Attend]) -> Attend:
    """Attend by `way` between two products of torch."""
    # The reference computes in float32 whatever it is given; what reads q by its type stays fast.
    exact = way.name == "reference"

    def run(
        q: torch.Tensor,
        keys: Rows,
        values: Rows,
        mask: torch.Tensor | None,
        scale: float,
        turn: torch.Tensor,
    ) -> torch.Tensor:
        asked = q.float() @ turn
        out = way.run(asked if exact else asked.to(q.dtype), keys, values, None, mask, scale)
        return (out.float() @ turn.T).to(q.dtype)

    return run


TURNED = tuple(
    Way(
        way.name,
        way.needs,
        lambda q, keys, values, turn, way=way: (
            way.supports(q, keys, values) and (way.name != "native" or _dense(turn))
        ),
        native.attend_turned if way.name == "native" else _around(way),
    )
    for way in DECODING
)
