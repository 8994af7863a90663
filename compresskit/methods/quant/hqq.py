"""Solve for each group's offset, so that a few large errors do not set it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit.methods.quant import _group
from compresskit.methods.quant._group import Activations, Bits, Group
from compresskit.methods.quant._rowwise import AbstractRowwise, Rounding, pack_each

if TYPE_CHECKING:
    from compresskit_kernels.grouped_matmul import GroupedWeight

    from compresskit.method import Context
    from compresskit.system import System

BETA, GROWTH = 10.0, 1.01
"""Weight of the quadratic coupling, and its growth an iteration (the authors' values)."""


def shrink(x: torch.Tensor, p: float, beta: float) -> torch.Tensor:
    """Generalised soft threshold: nearly argmin over y of |y|^p + beta / 2 * (y - x)^2."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-6).pow(p - 1) / beta).clamp(min=0)


def norms(errors: torch.Tensor, p: float) -> torch.Tensor:
    """Sum of |errors|^p of each group: `[N, groups, G]` -> `[N, groups]`."""
    return errors.abs().pow(p).sum(dim=2)


def quantise(
    weight: torch.Tensor,
    *,
    bits: int,
    group: int,
    p: float = 0.7,
    iterations: int = 20,
    dtype: torch.dtype = torch.bfloat16,
) -> GroupedWeight:
    """Round `weight` (float32 `[N, K]`) with the offsets that leave the smallest p-norm of errors.

    Half-quadratic splitting: with e in the place of the error, alternate

        e      <- shrink(W - dequantise(codes, offset))
        offset <- mean over the group of W - e - code * scale, and codes anew

    in units of the group's step, so that the result does not depend on the weight's scale. Each
    group keeps the best offset seen, as it is stored; the first is that of rounding to nearest.
    """
    width = weight.shape[1]
    size = _group.group_size(group, width)
    parts = _group.grouped(weight, size)
    start = _group.fit(parts, bits=bits, symmetric=False, dtype=dtype)
    assert start.offsets is not None
    step = start.step().unsqueeze(2)
    # A ragged last group is filled up with copies of its last column, which count for nothing.
    real = (torch.arange(parts.shape[1] * size, device=weight.device) < width).view(-1, size)
    share = real / real.sum(dim=1, keepdim=True)
    grid, best = start, start
    off = (parts - start.values(start.codes(parts))) / step
    least = norms(off * real, p)
    beta = BETA
    for _ in range(iterations):
        moved = ((off - shrink(off, p, beta)) * share).sum(dim=2) * step.squeeze(2)
        assert grid.offsets is not None
        grid = grid._replace(offsets=(grid.offsets.float() + moved).to(dtype))
        off = (parts - grid.values(grid.codes(parts))) / step
        norm = norms(off * real, p)
        better = norm < least
        if not bool(better.any()):
            break
        assert best.offsets is not None and grid.offsets is not None
        best = best._replace(offsets=torch.where(better, grid.offsets, best.offsets))
        least = torch.minimum(norm, least)
        beta *= GROWTH
    return _group.store(best.codes(parts), best, width, size)


@final
class HQQ(AbstractRowwise):
    """Store weights in 2 to 8 bits, each group's offset solved for robustly; no data needed.

    Rounding from minimum to maximum lets the two extremes of a group decide. Here the offset is
    moved by half-quadratic iterations on the sum of |error|^p with p < 1, which would rather leave
    a few large errors than many middling ones. No group is ever worse in that norm than rounded to
    nearest.

    Paper: Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models,
    https://mobiusml.github.io/hqq_blog (no arXiv number).
    Differs: errors are counted in steps of their group; each group keeps its own best iteration.
    Cost: `iterations` float passes over the weights at load, no calibration.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"bits": 3, "group": 32}

    bits: Bits = 4
    """Bits a code."""
    group: Group = 64
    """Weights that share a scale, along the input (0: a whole row); a last group may be ragged."""
    activations: Activations = "float"
    """What the weights are multiplied with: 16-bit floats, or int8 rounded per token and group."""
    p: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Exponent of the norm; smaller cares less about outliers."""
    iterations: Annotated[int, Field(ge=1, le=1000)] = 20
    """Most iterations; a slab of rows stops earlier when none of its groups improves."""

    def rounding(self, model: Any) -> Rounding:
        """The same for every layer."""
        scheme = _group.scheme(
            quantise,
            bits=self.bits,
            activations=self.activations,
            group=self.group,
            p=self.p,
            iterations=self.iterations,
        )
        return Rounding(lambda site: scheme, self.skip)

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        return pack_each(self, system, ctx)
