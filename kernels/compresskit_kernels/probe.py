"""Which implementation engages on this machine, and whether it beats a dense product here.

    examine("cpu") -> one row per operation and number of activation rows

A probe for people (`compresskit doctor`), not a benchmark: one shape, the best of a few dozen calls.
Weights are random, so that no product is spared. Dense is timed twice: as a model has it, and in
the best layout known (laid out once for oneDNN, on a CPU in bfloat16).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from compresskit_kernels import (
    fp8_matmul,
    grouped_dynamic_matmul,
    grouped_matmul,
    int8_dynamic_matmul,
    int8_matmul,
)
from compresskit_kernels.dispatch import choose
from compresskit_kernels.packing import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEIGHT, WIDTH, GROUP = 2048, 2048, 64
ROWS = (1, 4, 16, 64)
CALLS = 20


@dataclass(frozen=True)
class Row:
    """One operation against dense, for one number of activation rows; times in microseconds."""

    op: str
    implementation: str
    detail: str
    rows: int
    microseconds: float
    dense_microseconds: float
    best_dense_microseconds: float
    """The prepacked product where there is one, else the same as dense."""

    @property
    def speedup(self) -> float:
        """Dense time over this one's."""
        return self.dense_microseconds / self.microseconds

    @property
    def best_speedup(self) -> float:
        """Best dense time over this one's."""
        return self.best_dense_microseconds / self.microseconds


def examine(
    kind: str, dtype: torch.dtype = torch.bfloat16, rows: tuple[int, ...] = ROWS
) -> list[Row]:
    """Time the automatic choice of each product on `kind`, cpu or cuda."""
    generator = torch.Generator().manual_seed(0)
    dense_weight = torch.randn(HEIGHT, WIDTH, generator=generator).to(kind, dtype)
    prepacked = _prepacked(dense_weight)
    inputs = {m: torch.randn(m, WIDTH, generator=generator).to(kind, dtype) for m in rows}
    dense: dict[int, tuple[float, float]] = {}
    for m, x in inputs.items():
        plain = _best(partial(functional.linear, x, dense_weight), kind)
        best = plain if prepacked is None else min(plain, _best(partial(prepacked, x), kind))
        dense[m] = plain, best
    found = []
    for op, weight in _weights(kind, dtype, generator):
        way = choose(op, dense_weight, weight)
        product = way.prepare(weight)
        for m, x in inputs.items():
            taken = _best(partial(product, x), kind)
            found.append(Row(op.name, way.name, way.detail, m, taken, *dense[m]))
    return found


def _weights(kind: str, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Any]:
    shape = (HEIGHT, WIDTH)
    codes8 = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(kind)
    codes4 = pack(torch.randint(0, 16, shape, generator=generator), 4).to(kind)
    scales = torch.rand(HEIGHT, WIDTH // GROUP, generator=generator).to(kind, dtype)
    by_row = int8_matmul.Int8Weight(codes8, scales[:, 0].contiguous())
    grouped = grouped_matmul.GroupedWeight(codes4, scales, WIDTH, GROUP, offsets=scales.clone())
    floats = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn).to(kind)
    yield int8_matmul.OP, by_row
    yield int8_dynamic_matmul.OP, by_row
    yield grouped_matmul.OP, grouped
    yield grouped_dynamic_matmul.OP, grouped
    yield fp8_matmul.OP, fp8_matmul.Fp8Weight(floats, by_row.scales)


def _prepacked(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The dense product laid out once for oneDNN, where torch offers it."""
    if weight.is_cuda or weight.dtype is not torch.bfloat16:
        return None
    try:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    except (AttributeError, RuntimeError):  # private operators: absent, or no AVX-512
        return None
    call: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: call(x, laid_out, None, "none", [], "")


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
