"""Shapes, types and tolerances that every implementation of grouped_matmul is held to."""

from __future__ import annotations

import torch

SHAPES: tuple[tuple[int, int, int], ...] = (
    (1, 1, 1),
    (1, 7, 5),
    (3, 33, 17),
    (1, 64, 64),
    (4, 192, 576),
    (64, 100, 70),
    (65, 41, 401),
    (131, 129, 131),
    (2, 576, 640),
    (0, 8, 16),
    (2, 0, 16),
    (2, 3, 0),
)
"""(M, N, K): ones, primes, the edge of the packed path, and nothing at all."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

RELATIVE_ERROR = {
    "reference": 1e-6,
    "native": 6e-3,
    "cpu": 6e-3,
    "dequantised": 6e-3,
    "triton": 1e-3,
}
"""Largest ‖y - y64‖ / ‖y64‖ for an input of float32, by implementation, with y64 the formula in
float64 on the same codes (Triton's tensor cores round float32 inputs to tf32). Outputs of narrower
types add their own rounding (`ROUNDING`)."""

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Relative rounding of an output of this type."""

GROUPS = (32, 64, 128, 256)
