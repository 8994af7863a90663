"""Move a scale a channel from activations into weights: what AWQ and SmoothQuant share.

    method: statistics of the inputs, weights --> s [K], or None to leave the layers as they are
    here:   s into the norm or linear layer before, if that can be proved, else at run time
            W * s packed

Both look at the dense model only, so the calibration text flows through dense blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from compresskit.methods.quant._calibrate import Walk
from compresskit.methods.quant._fold import Bench
from compresskit.methods.quant._packed import PackedLinear

if TYPE_CHECKING:
    from pydantic import JsonValue

    from compresskit.hf.modules import Site
    from compresskit.method import Context
    from compresskit.methods.quant._calibrate import AbstractCalibrated
    from compresskit.methods.quant._fold import Fold
    from compresskit.methods.quant._moments import Moments, Shared
    from compresskit.methods.quant._packing import Scheme
    from compresskit.system import System


class Choice(Protocol):
    """What a method has decided for layers with one input."""

    @property
    def scale(self) -> torch.Tensor | None:
        """s `[K]`, or None for none."""

    @property
    def error(self) -> float:
        """Squared output error with it."""

    @property
    def error_rounded(self) -> float:
        """Squared output error without."""

    def stored(self, weight: torch.Tensor, effective: torch.Tensor | None, place: int) -> Any:
        """The stored form of the weight of layer `place` times `effective`, or None: by scheme."""


class Search(Protocol):
    """Chooses the scale."""

    def __call__(self, weights: list[torch.Tensor], moments: Moments) -> Choice:
        """Look at float32 weights `[N, K]` that share their inputs."""
