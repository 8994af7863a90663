"""Put new rows behind old ones as levels of a table, after turning them.

    y = x @ turn          a rotation: whatever x is like, the numbers of y look normal
    scale = |y| / sqrt(D)
    code = index of the level of the table nearest to y / scale

Paper: Zandieh et al. 2025, TurboQuant, arXiv 2504.19874 (algorithm 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compresskit_kernels.dispatch import Way, choose_way, note
from compresskit_kernels.kv_decode import native, reference
from compresskit_kernels.kv_decode.planes import bounds, level_codes, pack

if TYPE_CHECKING:
    from compresskit_kernels.kv_decode.cache import Rows


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
    run = choose_way("kv_extend", WAYS, impl, x, old, turn)
    return run(old, x, turn)


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
    assert old.table is not None, "asked for"
    return native.extend_turned(old, x, turn, bounds(old.table))


def _fits(x: torch.Tensor, old: Rows, turn: torch.Tensor) -> bool:
    dense = turn.dtype is torch.float32 and turn.is_contiguous()
    return dense and turn.device.type == "cpu" and native.encodes(old, x, x.shape[-1])


WAYS = (
    Way("native", native.NEEDS, _fits, _native),
    Way(
        "reference",
        "floating-point rows",
        lambda x, old, turn: x.is_floating_point(),
        _reference,
    ),
)
