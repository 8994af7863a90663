"""Scale up the input channels that matter, then round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit.methods.quant import _group
from compresskit.methods.quant._calibrate import AbstractCalibrated
from compresskit.methods.quant._group import Activations, Bits, Group, ZeroPoint
from compresskit.methods.quant._packing import SLAB
from compresskit.methods.quant._smooth import Scaled, smooth

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit_kernels.grouped_matmul import GroupedWeight

    from compresskit.method import Context
    from compresskit.methods.quant._moments import Moments
    from compresskit.system import System

SHRINKS = tuple(1 - step / 20 for step in range(11))
"""Shares of a group's range that the clip search tries: 1 down to 0.5, as in the paper's code."""


def channel_scale(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return s = mean|x|^alpha, `[K]`, around one; one for channels that are never used."""
    used = mean > 0
    scale = mean.where(used, 1.0).pow(alpha)
    if bool(used.any()):
        scale = scale / (scale[used].amax() * scale[used].amin()).sqrt()
    return scale.clamp(1e-4, 1e4).where(used, 1.0)


class Search:
    """Tries the scales, and adds up what they cost beside plain rounding."""

    def __init__(
        self,
        *,
        bits: int,
        group: int,
        symmetric: bool,
        zero_point: ZeroPoint,
        points: int,
        clip: bool,
    ) -> None:
        """Look at `points` values of alpha from 0 (round to nearest) to below 1."""
        self.bits, self.group, self.points, self.clip = bits, group, points, clip
        self.fit = {"bits": bits, "symmetric": symmetric, "zero_point": zero_point}
        self.error = self.rounded = 0.0
        self.alphas: list[float] = []

    def loss(
        self, weights: list[torch.Tensor], moments: Moments, scale: torch.Tensor | None
    ) -> float:
        """Squared output error a token of rounding the weights `[N, K]` with this scale."""
        total = 0.0
        for slab in _slabs(weights):
            exact = slab if scale is None else slab * scale
            parts = _group.grouped(exact, _group.group_size(self.group, exact.shape[1]))
            grid = _group.fit(parts, **self.fit)  # type: ignore[arg-type]
            values = grid.values(grid.codes(parts)).flatten(1)[:, : exact.shape[1]]
            total += moments.error((values if scale is None else values / scale) - slab)
        return total

    def scale(self, weights: list[torch.Tensor], moments: Moments) -> torch.Tensor | None:
        """The scale with the least loss; None if plain rounding is best."""
        mean = moments.mean()
        best = rounded = self.loss(weights, moments, None)
        chosen, alpha = None, 0.0
        for step in range(1, self.points):
            candidate = channel_scale(mean, step / self.points)
            loss = self.loss(weights, moments, candidate)
            if loss < best:
                best, chosen, alpha = loss, candidate, step / self.points
        self.rounded += rounded
        self.alphas.append(alpha)
        return chosen

    def store(self, target: Scaled, moments: Moments) -> GroupedWeight:
        """Round; with narrower groups where the clip search found that better."""
        plain = self._packed(target.exact, None)
        error = moments.error(target.difference(plain.dequantise()))
        if self.clip:
            hessian = moments.hessian()
            if target.scale is not None:
                hessian = hessian / torch.outer(target.scale, target.scale)
            clipped = self._packed(target.exact, hessian)
            less = moments.error(target.difference(clipped.dequantise()))
            if less < error:
                plain, error = clipped, less
        self.error += error
        return plain

    def facts(self) -> dict[str, JsonValue]:
        """The objective beside plain rounding, and the exponents found."""
        return {
            "objective_relative_to_rtn": self.error / self.rounded if self.rounded else 1.0,
            "mean_alpha": sum(self.alphas) / max(1, len(self.alphas)),
        }

    def _packed(self, exact: torch.Tensor, hessian: torch.Tensor | None) -> GroupedWeight:
        width = exact.shape[1]
        size = _group.group_size(self.group, width)
        done = []
        for slab in _slabs([exact]):
            parts = _group.grouped(slab, size)
            grid = _group.fit(parts, **self.fit)  # type: ignore[arg-type]
            if hessian is not None:
                grid = self._clipped(parts, grid, _diagonal_blocks(hessian, size))
            done.append(_group.store(grid.codes(parts), grid, width, size))
        return type(done[0]).join(done)

    def _clipped(self, parts: torch.Tensor, grid: _group.Grid, blocks: torch.Tensor) -> _group.Grid:
        """For each group the range whose own output error is least; the full one to begin with."""
        most = parts.abs().amax(dim=2, keepdim=True)
        best = _within(parts, grid, blocks)
        for shrink in SHRINKS[1:]:
            narrow = parts.clamp(-most * shrink, most * shrink)
            tried = _group.fit(narrow, **self.fit)  # type: ignore[arg-type]
            error = _within(parts, tried, blocks)
            better = error < best
            best = torch.minimum(best, error)
            grid = _group.Grid(
                torch.where(better, tried.scales, grid.scales),
                _chosen(better, tried.offsets, grid.offsets),
                _chosen(better, tried.zeros, grid.zeros),
                grid.bits,
            )
        return grid


def _slabs(weights: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Rows of all the weights in float32, about `SLAB` numbers at a time."""
    for weight in weights:
        for slab in torch.split(weight, max(1, SLAB // max(1, weight.shape[1]))):
            yield slab.float()


def _diagonal_blocks(hessian: torch.Tensor, size: int) -> torch.Tensor:
    """`[K, K]` -> `[groups, G, G]`, zeros where a ragged last group is filled."""
    short = -hessian.shape[0] % size
    filled = torch.nn.functional.pad(hessian, (0, short, 0, short))
    groups = filled.shape[0] // size
    index = torch.arange(groups, device=hessian.device)
    return filled.view(groups, size, groups, size)[index, :, index]


def _within(parts: torch.Tensor, grid: _group.Grid, blocks: torch.Tensor) -> torch.Tensor:
    """Output error `[N, groups]` of each group alone."""
    off = (grid.values(grid.codes(parts)) - parts).transpose(0, 1)
    return ((off @ blocks) * off).sum(dim=2).t()


def _chosen(
    better: torch.Tensor, one: torch.Tensor | None, other: torch.Tensor | None
) -> torch.Tensor | None:
    return None if one is None or other is None else torch.where(better, one, other)


@final
class AWQ(AbstractCalibrated):
    """Scale each input channel up by how large its activations are, then round in groups.

    A channel with large activations is hurt most by rounding; scaling its weights up and its
    activations down makes its rounding finer. One exponent a set of layers, s = mean|x|^alpha, is
    searched on calibration data for the least output error; alpha = 0, plain rounding, stays a
    candidate. The scale is folded into the norm or linear layer before where running the block
    proves that right, and applied at run time elsewhere.

    Paper: Lin et al. 2023, AWQ, arXiv 2306.00978 (section 3.2, activation-aware scaling).
    Differs: the error is that of each layer's output over all tokens, through their second moment,
    not that of the attention or MLP block on a sample; clipping must pay off in the same measure.
    Cost: one pass of the calibration text, a second moment [K, K] for each distinct input, and
    `points` roundings of every weight; at run time nothing where scales could be folded, one
    product a channel elsewhere.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {
        "bits": 3, "group": 32, "points": 6, "samples": 8, "length": 64
    }  # fmt: skip

    bits: Bits = 4
    """Bits a code."""
    group: Group = 64
    """Weights that share a scale, along the input (0: a whole row); a last group may be ragged."""
    symmetric: bool = False
    """Levels around zero without an offset, instead of from minimum to maximum."""
    zero_point: ZeroPoint = "float"
    """Without symmetry: a float offset, or an integer zero point as checkpoints store it."""
    activations: Activations = "float"
    """What the weights are multiplied with: 16-bit floats, or int8 rounded per token and group."""
    points: Annotated[int, Field(ge=2, le=100)] = 20
    """Values of alpha to try, from 0 to below 1."""
    clip: bool = True
    """Also search for narrower ranges of each group."""
    fold_only: bool = False
    """Scale only where the scale folds into the layer before, as checkpoints of other tools need it;
    the other layers are rounded as they are."""

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        options: dict[str, Any] = {
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "zero_point": self.zero_point,
        }
        search = Search(**options, points=self.points, clip=self.clip)
        scheme = _group.scheme(activations=self.activations, **options)
        return smooth(
            self,
            system,
            ctx,
            scheme,
            search,
            label="awq",
            products=True,
            keep=False,
            fold_only=self.fold_only,
        )
