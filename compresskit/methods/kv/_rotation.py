"""Seeded random rotations: whatever a vector looks like, its rotated numbers look normal.

    x [..., D] ──► x @ turn      lengths and inner products stay:  (k @ turn) . (q @ turn) = k . q

A channel that is always large is spread over all D numbers, so one table of levels fits every
token, head and model. Queries are turned once a step; stored keys never are turned back.

    orthogonal   every rotation is equally likely (Haar measure): what the proofs assume
    hadamard     random signs, then sums and differences of everything: for D = 2^n

For other D the Hadamard part is the largest power of two that divides D, and an orthogonal matrix
of what is left mixes the blocks.
"""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["orthogonal", "hadamard"]


def rotation(kind: Kind, width: int, seed: int) -> torch.Tensor:
    """A float32 orthogonal matrix `[width, width]`, the same one for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "orthogonal":
        return _orthogonal(width, generator).float()
    power = width & -width
    mixed = torch.kron(_orthogonal(width // power, generator).contiguous(), _hadamard(power))
    signs = torch.randint(0, 2, (width, 1), generator=generator) * 2.0 - 1.0
    return (signs * mixed).float()


def _orthogonal(width: int, generator: torch.Generator) -> torch.Tensor:
    """Drawn by the Haar measure: Mezzadri 2006, How to Generate Random Matrices, arXiv math-ph/0609050."""
    normal = torch.randn(width, width, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(normal)
    # QR leaves the signs of the columns to the routine; those of R make the factorisation unique.
    # QR hands out columns; the kernels that read the matrix want rows.
    turned: torch.Tensor = (q * r.diagonal().sign()).contiguous()
    return turned


def _hadamard(width: int) -> torch.Tensor:
    """Sylvester's matrix of a power of two, scaled to be orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    while len(matrix) < width:
        matrix = torch.kron(matrix, step)
    return matrix
