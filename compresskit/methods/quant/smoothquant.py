"""Move the outliers of activations into the weights, then round both to 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, final

import torch
from compresskit_kernels.activations import round_rows
from compresskit_kernels.int8_dynamic_matmul import OP
from pydantic import Field, JsonValue

from compresskit.methods.quant._calibrate import AbstractCalibrated
from compresskit.methods.quant._packing import Scheme
from compresskit.methods.quant._smooth import Scaled, smooth
from compresskit.methods.quant.int8 import quantise

if TYPE_CHECKING:
    from compresskit_kernels.int8_matmul import Int8Weight

    from compresskit.method import Context
    from compresskit.methods.quant._moments import Moments
    from compresskit.system import System

SCHEME = Scheme(op=OP, bits=8, quantise=quantise)


def channel_scale(largest: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """Return max|x|^alpha / max|W|^(1 - alpha), `[K]`; one for channels without inputs or weights."""
    most = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    used = (largest > 0) & (most > 0)
    scale = largest.where(used, 1.0).pow(alpha) / most.where(used, 1.0).pow(1 - alpha)
    return scale.clamp(1e-4, 1e4).where(used, 1.0)


def output_error(
    tokens: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None
) -> float:
    """Squared error of the rounded product of tokens `[M, K]` and a weight `[N, K]`."""
    total = 0.0
    eased = tokens if scale is None else tokens / scale
    seen = round_rows(eased).dequantise()
    for rows in torch.split(weight, 1 << 14):
        exact = rows.float()
        stored = quantise(exact if scale is None else exact * scale).dequantise()
        off = seen @ stored.t() - tokens @ exact.t()
        total += float(off.square().sum(dtype=torch.float64))
    return total


class Balance:
    """Chooses s, and leaves a layer alone that it would hurt."""

    def __init__(self, alpha: float) -> None:
        """`alpha`: how much of the difficulty the weights take over."""
        self.alpha = alpha
        self.error = self.rounded = 0.0

    def scale(self, weights: list[torch.Tensor], moments: Moments) -> torch.Tensor | None:
        """The scale, or None where the calibration tokens are better off without."""
        scale = channel_scale(moments.largest, weights, self.alpha)
        plain = sum(output_error(moments.tokens, weight) for weight in weights)
        eased = sum(output_error(moments.tokens, weight, scale) for weight in weights)
        self.rounded += plain
        self.error += min(plain, eased)
        return scale if eased < plain else None

    def store(self, target: Scaled, moments: Moments) -> Int8Weight:
        """Round each row."""
        return SCHEME.store(target.exact)

    def facts(self) -> dict[str, JsonValue]:
        """The output error on calibration tokens beside that without smoothing."""
        return {"objective_relative_to_rtn": self.error / self.rounded if self.rounded else 1.0}


@final
class SmoothQuant(AbstractCalibrated):
    """Divide outlier channels of the activations, multiply their weights, round both to int8 (W8A8).

    One step a token has to span its largest activation, and a few channels are a hundred times
    larger than the rest. Dividing each channel by s = max|x|^alpha / max|W|^(1 - alpha) shares the
    range between activations and weights. s is folded into the norm or linear layer before where
    running the block proves that right, and applied at run time elsewhere.

    Paper: Xiao et al. 2022, SmoothQuant, arXiv 2211.10438 (equation 4).
    Differs: activations are rounded per token at run time; every layer may be smoothed, and one
    that is worse off with it on calibration tokens is left as it is.
    Cost: one pass of the calibration text and one rounding of the weights more; at run time what
    `quant/int8_dynamic` costs, and one product a channel where a scale could not be folded.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"samples": 8, "length": 64}

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the difficulty that moves into the weights; 0.5 halves it, 0.8 suits wild outliers."""
    fold_only: bool = False
    """Scale only where the scale folds into the layer before, as checkpoints of other tools need it;
    the other layers are rounded as they are."""

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        return smooth(
            self,
            system,
            ctx,
            SCHEME,
            Balance(self.alpha),
            label="smoothquant",
            products=False,
            keep=True,
            fold_only=self.fold_only,
        )
