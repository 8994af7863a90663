"""One linear layer, eight ways: dense, prepacked and packed. Microseconds per call, one thread.

    pytest benchmarks/bench_ops.py --benchmark-only --benchmark-columns=min,median

Shapes are those of SmolLM2-135M and a square one; rows are a single decode, a small batch (or a
speculative verification) and a short prompt. The weight is the same in every round, so layers that
fit the last-level cache are measured warm: a whole model is slower than the sum of its layers.
The prepacked layer is the dense baseline to beat; the plain one pays for a reorder in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compresskit_kernels import (
    grouped_dynamic_matmul,
    grouped_matmul,
    int8_dynamic_matmul,
    int8_matmul,
)
from compresskit_kernels.dispatch import Prepared, choose
from torch import nn

from compresskit.hf.prepack import PrepackedLinear
from compresskit.methods.quant import int8
from compresskit.methods.quant._group import quantise

SHAPES = {
    "qo 576x576": (576, 576),
    "kv 192x576": (192, 576),
    "gate_up 1536x576": (1536, 576),
    "down 576x1536": (576, 1536),
    "head 49152x576": (49152, 576),
    "square 2048x2048": (2048, 2048),
}


def plain(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    return layer


def prepacked(weight: torch.Tensor) -> nn.Module:
    return PrepackedLinear(weight.bfloat16(), None)


def w8a16(weight: torch.Tensor) -> Prepared:
    stored = int8.quantise(weight)
    return choose(int8_matmul.OP, weight, stored).prepare(stored)


def w8a16_torch(weight: torch.Tensor) -> Prepared:
    stored = int8.quantise(weight)
    return choose(int8_matmul.OP, weight, stored, "cpu").prepare(stored)


def w8a8(weight: torch.Tensor) -> Prepared:
    stored = int8.quantise(weight)
    return choose(int8_dynamic_matmul.OP, weight, stored).prepare(stored)


def w4a16(weight: torch.Tensor) -> Prepared:
    stored = quantise(weight)
    return choose(grouped_matmul.OP, weight, stored).prepare(stored)


def w4a16_torch(weight: torch.Tensor) -> Prepared:
    stored = quantise(weight)
    return choose(grouped_matmul.OP, weight, stored, "cpu").prepare(stored)


def w4a8(weight: torch.Tensor) -> Prepared:
    stored = quantise(weight)
    return choose(grouped_dynamic_matmul.OP, weight, stored).prepare(stored)


WAYS = [plain, prepacked, w8a16, w8a16_torch, w8a8, w4a16, w4a16_torch, w4a8]


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(
    benchmark: Any, shape: str, rows: int, make: Callable[[torch.Tensor], Callable[..., Any]]
) -> None:
    torch.set_num_threads(1)
    benchmark.group = f"{shape}, M={rows}"
    torch.manual_seed(0)
    weight = torch.randn(SHAPES[shape])
    x = torch.randn(rows, SHAPES[shape][1]).bfloat16()
    with torch.inference_mode():
        layer = make(weight)
        benchmark.pedantic(layer, (x,), rounds=40, iterations=5, warmup_rounds=3)
