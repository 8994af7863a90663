"""Which implementation engages on this machine, and whether it beats a dense product here.

    examine("cpu") -> one row per operation: implementation, microseconds, dense microseconds

A probe for people (`compresskit doctor`), not a benchmark: one shape, one row of activations, the
best of a few dozen calls. Weights are random, so that no product is spared.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from compresskit_kernels import grouped_matmul, int8_matmul
from compresskit_kernels.dispatch import choose
from compresskit_kernels.packing import pack

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH, GROUP = 2048, 2048, 64
CALLS = 40


@dataclass(frozen=True)
class Row:
    """One operation against dense: times in microseconds for one row of activations."""

    op: str
    implementation: str
    detail: str
    microseconds: float
    dense_microseconds: float

    @property
    def speedup(self) -> float:
        """Dense time over this one's."""
        return self.dense_microseconds / self.microseconds


def examine(kind: str, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Time the automatic choice of each weight-only product on `kind`, cpu or cuda."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, WIDTH, generator=generator).to(kind, dtype)
    dense_weight = torch.randn(ROWS, WIDTH, generator=generator).to(kind, dtype)
    dense = _best(lambda: functional.linear(x, dense_weight), kind)
    codes8 = torch.randint(-127, 128, (ROWS, WIDTH), dtype=torch.int8, generator=generator)
    codes4 = torch.randint(0, 16, (ROWS, WIDTH), generator=generator)
    scales = torch.rand(ROWS, WIDTH // GROUP, generator=generator).to(kind, dtype)
    weights: list[tuple[Any, Any]] = [
        (int8_matmul.OP, int8_matmul.Int8Weight(codes8.to(kind), scales[:, 0])),
        (
            grouped_matmul.OP,
            grouped_matmul.GroupedWeight(
                pack(codes4, 4).to(kind), scales, WIDTH, GROUP, offsets=scales.clone()
            ),
        ),
    ]
    rows = []
    for op, weight in weights:
        way = choose(op, x, weight)
        product = way.prepare(weight)
        taken = _best(partial(product, x), kind)
        rows.append(Row(op.name, way.name, way.detail, taken, dense))
    return rows


@torch.inference_mode()
def _best(call: Callable[[], object], kind: str) -> float:
    """Shortest of some calls, in microseconds; the first ones warm up."""
    wait = torch.cuda.synchronize if kind == "cuda" else _nothing
    times = []
    for _ in range(CALLS):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return 1e6 * min(times[CALLS // 4 :])


def _nothing() -> None:
    """The CPU is done when the call returns."""
