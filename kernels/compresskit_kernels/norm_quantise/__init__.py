"""RMSNorm and rounding to int8 per token in one pass: what a W8A8 product takes.

    y[m, k]     = x[m, k] / sqrt(mean_k x[m, k]^2 + eps) * (shift + weight[k])
    steps[m]    = max_k |y[m, k]| / 127
    codes[m, k] = round(y[m, k] / steps[m])              half to even; a row of zeros has step 0

x `[..., K]` float32, bfloat16 or float16; the result as `activations.round_rows` gives it for y
`[M, K]`, with M the product of the leading dimensions. Everything is float32: y is not rounded to
the model's type in between, which a separate norm would do. `shift` is 1 for Gemma, else 0.

Papers: Zhang & Sennrich 2019, RMSNorm, arXiv 1910.07467; Yao et al. 2022, ZeroQuant, arXiv
2206.01861 (token-wise int8 activations).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from compresskit_kernels.dispatch import Way, choose_way
from compresskit_kernels.norm_quantise import reference

if TYPE_CHECKING:
    import torch

    from compresskit_kernels.activations import Rounded

WIDEST = 16384
"""Largest K of the Triton kernel, which holds a row in registers."""


def norm_quantise(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    shift: float = 0.0,
    impl: str = "auto",
) -> Rounded:
    """Norm x `[..., K]` with `weight` `[K]` and round it: codes `[M, K]`, steps `[M, 1]`.

    Raises:
        ValueError: a weight of another width, or an explicit choice that cannot run.
        LookupError: an unknown `impl`.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"norm_quantise: a weight {list(weight.shape)} does not fit inputs {list(x.shape)}."
        )
    return choose_way("norm_quantise", WAYS, impl, x)(x, weight, eps, shift)


def _supports(x: torch.Tensor) -> bool:
    return x.is_cuda and find_spec("triton") is not None and fits(x)


def fits(x: torch.Tensor) -> bool:
    """Whether the Triton kernel is written for this shape and type, on whatever device."""
    return (
        str(x.dtype).removeprefix("torch.") in ("bfloat16", "float16", "float32")
        and 0 < x.shape[-1] <= WIDEST
        and x.numel() > 0
    )


def _triton(x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float) -> Rounded:
    from compresskit_kernels.norm_quantise import triton

    return triton.norm_rows(x, weight, eps, shift)


WAYS = (
    Way(
        "triton",
        f"a CUDA device, triton, and rows of 1 to {WIDEST} float32, bfloat16 or float16 numbers",
        _supports,
        _triton,
    ),
    Way("reference", "a floating-point input", reference.supports, reference.norm_rows),
)

__all__ = ["WAYS", "norm_quantise"]
