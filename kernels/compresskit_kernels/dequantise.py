"""Dequantise in every call and multiply densely: what any weight-only operation can always do.

Two implementations of one idea, shared by all operations: `reference` computes in float32 and runs
anywhere (on a CPU without a fast path it *is* the product); `on_cuda` computes in the type of x
and is what a GPU runs where there is no kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

import torch
from torch.nn import functional

from compresskit_kernels.dispatch import Implementation, Prepared, Use, note


class Stored(Protocol):
    """A quantised weight in its stored, portable form."""

    def dequantise(self) -> torch.Tensor:
        """The weight in float32, `[N, K]`."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by role."""

    def take(self, rows: torch.Tensor) -> Self:
        """These rows (int64 `[n]`), as a weight of their own."""


W = TypeVar("W", bound=Stored)


Round = Callable[[torch.Tensor, Any], torch.Tensor]
"""x `[M, K]` and the stored weight -> what the product sees of x, float32 `[M, K]`."""


class Dequantised(Prepared):
    """Keeps the stored form; pays for the dequantisation in every call."""

    __slots__ = ("in_float32", "rounded", "routine", "weight")

    def __init__(
        self, weight: Stored, routine: Use, *, in_float32: bool, rounded: Round | None = None
    ) -> None:
        """Keep `weight` as it is; `rounded` is what an A8 product does to its inputs."""
        self.weight = weight
        self.routine = routine
        self.in_float32 = in_float32
        self.rounded = rounded

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`; return the type of x."""
        note(self.routine)
        weight = self.weight.dequantise()
        if self.rounded is not None:
            flat = self.rounded(x.reshape(x.shape[:-1].numel(), x.shape[-1]), self.weight)
            if not self.in_float32:
                flat, weight = flat.to(x.dtype), weight.to(x.dtype)
            return functional.linear(flat, weight).to(x.dtype).view(*x.shape[:-1], weight.shape[0])
        if self.in_float32:
            return functional.linear(x.float(), weight).to(x.dtype)
        return functional.linear(x, weight.to(x.dtype))

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight."""
        return self.weight.take(index.reshape(-1)).dequantise().view(*index.shape, -1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors."""
        return self.weight.tensors()


def reference(op: str, rounded: Round | None = None) -> Implementation[W]:
    """The formula in plain torch, float32 throughout."""
    routine = Use(op, "reference: dequantise float32")
    return Implementation(
        name="reference",
        detail=routine.routine,
        needs="a floating-point input",
        supports=lambda x, _: x.is_floating_point(),
        prepare=lambda weight: Dequantised(weight, routine, in_float32=True, rounded=rounded),
    )


def on_cuda(op: str, rounded: Round | None = None) -> Implementation[W]:
    """The path of CUDA devices: dequantise, then a dense product in the type of x."""
    routine = Use(op, "cuda: torch dequantise + matmul")
    return Implementation(
        name="dequantised",
        detail=routine.routine,
        needs="a floating-point input on a CUDA device",
        supports=lambda x, _: x.is_cuda and x.is_floating_point(),
        prepare=lambda weight: Dequantised(weight, routine, in_float32=False, rounded=rounded),
    )
