"""What the stages of matrix products share: our arm, the dense one, and their bytes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from compresskit_kernels.dispatch import Op, choose
from torch.nn import functional

from benchmarks.gpu.arms import OURS, Arm, Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from benchmarks.gpu.stages.settings import Settings

DENSE = "torch F.linear bf16"
LIMIT = 1e-2
"""Weights, inputs and outputs are rounded to bfloat16."""


def ours(
    op: Op[Any], x: torch.Tensor, make: Callable[[int], Any], weight_bytes: int, impl: str
) -> Arm:
    """Our implementation `impl` of a product."""

    def build(copies: int) -> list[Callable[[], torch.Tensor]]:
        calls = []
        for i in range(copies):
            weight = make(i)
            calls.append(partial(choose(op, x, weight, impl).prepare(weight), x))
        return calls

    moved = weight_bytes + _around(x, make)
    return Arm(f"{OURS} {impl}", build, moved, LIMIT)


def dense(x: torch.Tensor, make: Callable[[int], Any], size: tuple[int, int], limit: float) -> Arm:
    """The dense product with the same weights, dequantised beforehand."""

    def build(copies: int) -> list[Callable[[], torch.Tensor]]:
        weights = [make(i).dequantise().to(x.dtype) for i in range(copies)]
        return [partial(functional.linear, x, weight) for weight in weights]

    return Arm(DENSE, build, 2 * size[0] * size[1] + _around(x, make, size), limit)


def entry(
    op: Op[Any],
    x: torch.Tensor,
    make: Callable[[int], Any],
    size: tuple[int, int],
    arms: tuple[Arm, ...],
    dense_limit: float = LIMIT,
    **shape: int | str,
) -> Entry:
    """An entry against the dense product, checked against the operation's reference.

    The dense product is further from it where the activations are rounded: `dense_limit`.
    """

    def expected() -> torch.Tensor:
        weight = make(0)
        return choose(op, x, weight, "reference").prepare(weight)(x)

    shape = {**shape, "M": x.shape[0], "N": size[0], "K": size[1]}
    return Entry(op.name, shape, expected, (dense(x, make, size, dense_limit), *arms), DENSE)


def inputs(settings: Settings, rows: int, width: int) -> torch.Tensor:
    """Activations `[M, K]`."""
    return settings.randn(rows, width, seed=1)


def _around(x: torch.Tensor, make: Any, size: tuple[int, int] | None = None) -> int:
    """Bytes of inputs and outputs; the height is the weight's."""
    height = size[0] if size is not None else make.keywords["size"][0]
    return int(x.element_size() * x.shape[0] * (x.shape[1] + height))
