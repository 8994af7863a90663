"""GPTQ's solver: columns are rounded in turn, and those to come make up for the error.

columns  | rounded | being rounded, at once | wait for a product with all errors so far |
         0       start                    stop                                          K
                     <------ lazy block ---->
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.errors import RunError
from compresskit.methods.quant import _group
from compresskit.methods.quant._group import Grid

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit_kernels.grouped_matmul import GroupedWeight

LAZY = 128
"""Columns rounded before their errors reach all the others in one product (the paper's B)."""

ROWS = 1 << 14
"""Rows solved at a time: they do not depend on each other."""


class Solution(NamedTuple):
    """What `solve` finds."""

    codes: torch.Tensor
    """uint8 `[N, K]`, columns in their original order."""
    grid: Grid

    def store(self, rows: slice, size: int) -> GroupedWeight:
        """These rows, packed, in groups of `size`."""
        codes, grid = self.codes[rows], self.grid
        own = Grid(
            grid.scales[rows],
            None if grid.offsets is None else grid.offsets[rows],
            None if grid.zeros is None else grid.zeros[rows],
            grid.bits,
        )
        return _group.store(codes.unsqueeze(1), own, codes.shape[1], size)


def inverse_root(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with Uᵀ U = (H + damping * mean diagonal)^-1, in float64.

    With the order of rows and columns reversed, a Cholesky factor of H is upper triangular, and its
    inverse is U: one factorisation instead of inverting H first. An input that was never used has
    no row in H; it gets a one on the diagonal, so that its weight is rounded on its own.

    Raises:
        RunError: the matrix is not positive definite even so.
    """
    damped = hessian.double()
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    damped = damped + torch.diag(torch.where(dead, 1.0, damping * diagonal.mean()))
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise RunError(
            "The second moment of the activations is too close to singular to be inverted. Raise "
            "damping, or calibrate on more text."
        )
    unit = torch.eye(damped.shape[0], dtype=damped.dtype, device=damped.device)
    upper: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
    return upper


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fit: Callable[[torch.Tensor], Grid],
    *,
    size: int,
    damping: float = 0.01,
    act_order: bool = False,
) -> Solution:
    """Round `weight` `[N, K]` so that the error of x @ Wᵀ is small for inputs of second moment H.

    Column k is rounded to w_k -> q_k, and every later column j takes over
    (w_k - q_k) / U_kk * U_kj, the least-squares answer to that error (U of `inverse_root`).

    Args:
        weight: float32 or float64.
        hessian: `[K, K]`, any positive multiple of the sum of x xᵀ.
        fit: the grid of weights `[N, groups, G]`. A group's is taken when its first column is
            reached, from columns that hold the errors of all before.
        size: G.
        damping: share of the mean diagonal that is added to the diagonal.
        act_order: round the columns with the largest inputs first. Groups stay as they are, with
            grids of the weight as given, so nothing has to be permuted at run time.
    """
    diagonal = hessian.diagonal()
    order = torch.arange(hessian.shape[0], device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    upper = inverse_root(hessian[order][:, order], damping).to(weight.dtype)
    parts = [
        _solve_rows(rows, upper, order.tolist() if act_order else None, fit, size)
        for rows in torch.split(weight, ROWS)
    ]
    grids = [part.grid for part in parts]
    return Solution(torch.cat([part.codes for part in parts]), _stacked(grids, dim=0))


def _solve_rows(
    weight: torch.Tensor,
    upper: torch.Tensor,
    order: list[int] | None,
    fit: Callable[[torch.Tensor], Grid],
    size: int,
) -> Solution:
    rows, width = weight.shape
    # Transposed, a column is a stretch of memory.
    left = (weight if order is None else weight[:, order]).t().contiguous()
    codes = torch.empty(width, rows, dtype=torch.uint8, device=weight.device)
    grids: list[Grid] = []
    if order is not None or size >= width:
        grids = _by_group(fit(_group.grouped(weight, size)))
    # Groups must not straddle lazy blocks, or a grid would miss errors that are still on their way.
    lazy = LAZY if size >= width else size * max(1, LAZY // size)
    for start in range(0, width, lazy):
        stop = min(start + lazy, width)
        errors = torch.empty(stop - start, rows, dtype=weight.dtype, device=weight.device)
        for place in range(start, stop):
            column = place if order is None else order[place]
            if column // size == len(grids):
                ahead = left[place : min(place + size, width)].t()
                grids.append(fit(_group.grouped(ahead, size)))
            grid = grids[column // size]
            code = grid.codes(left[place].view(-1, 1, 1))
            codes[column] = code.view(-1).to(torch.uint8)
            error = (left[place] - grid.values(code).view(-1)) / upper[place, place]
            left[place + 1 : stop].addr_(upper[place, place + 1 : stop], error, alpha=-1)
            errors[place - start] = error
        left[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return Solution(codes.t(), _stacked(grids, dim=1))


def _by_group(grid: Grid) -> list[Grid]:
    """One grid a group."""
    groups = range(grid.scales.shape[1])
    return [
        Grid(
            grid.scales[:, g : g + 1],
            None if grid.offsets is None else grid.offsets[:, g : g + 1],
            None if grid.zeros is None else grid.zeros[:, g : g + 1],
            grid.bits,
        )
        for g in groups
    ]


def _stacked(grids: list[Grid], *, dim: int) -> Grid:
    """Grids side by side (1) or on top of each other (0)."""
    offsets = [grid.offsets for grid in grids if grid.offsets is not None]
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return Grid(
        torch.cat([grid.scales for grid in grids], dim=dim),
        torch.cat(offsets, dim=dim) if offsets else None,
        torch.cat(zeros, dim=dim) if zeros else None,
        grids[0].bits,
    )
