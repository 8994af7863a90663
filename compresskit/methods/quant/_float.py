"""Tiny floating-point numbers (E2M1, E4M3) and the scales that groups of them share.

    E2M1   0 .5 1 1.5 2 3 4 6, and the same with a sign bit: 4 bits
    E4M3   3 bits of mantissa, up to 448, no infinity: 8 bits, torch.float8_e4m3fn
    E8M0   a power of two and nothing else, 2^-127 to 2^127: the scale of the MX formats

Rounding is to nearest, ties to the even mantissa. Where such numbers stand for activations and no
unit here multiplies them, `RoundedInputs` rounds what flows into a real product of the weights: the
quality is that of the format, the speed is not.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from compresskit_kernels.dispatch import Implementation, Op, Prepared, Use, note

from compresskit.methods.quant._group import grouped

if TYPE_CHECKING:
    from collections.abc import Callable

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *(-level for level in _MAGNITUDES))
"""The numbers by code: bit 3 is the sign, so code 8 is a negative zero."""
E2M1_LARGEST = 6.0
E4M3_LARGEST = 448.0
E2M1_EXPONENT, E4M3_EXPONENT = 2, 8
"""Exponents of the largest numbers of each type."""

W = TypeVar("W")


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of the E2M1 numbers nearest to `values`; beyond 6 saturates.

    Magnitude by code is a bent line: steps of 1/2 up to 2, of 1 up to 4, of 2 from there. Each
    straight part, inverted, is the least of the three where it applies, and rounding it to whole
    codes, half to even, is rounding the number to an even mantissa.
    """
    sizes = values.abs().float()
    codes = torch.round(2 * sizes)
    codes = torch.minimum(codes, torch.round(sizes + 2))
    codes = torch.minimum(codes, torch.round(sizes / 2 + 4)).clamp(max=7)
    return codes.to(torch.uint8) | (values < 0).to(torch.uint8) << 3


def e2m1(values: torch.Tensor) -> torch.Tensor:
    """`values` rounded to E2M1, float32."""
    levels = torch.tensor(E2M1, dtype=torch.float32, device=values.device)
    return levels[e2m1_codes(values).long()]


def e4m3(values: torch.Tensor) -> torch.Tensor:
    """`values` rounded to E4M3, float32; beyond 448 saturates, which older torch did not do."""
    clamped = values.float().clamp(-E4M3_LARGEST, E4M3_LARGEST)
    return clamped.to(torch.float8_e4m3fn).float()


def power_of_two(largest: torch.Tensor, exponent: int) -> torch.Tensor:
    """The E8M0 scale, float32, for groups whose largest magnitudes are `largest`.

    The exponent of the largest magnitude less that of the type's largest number (`exponent`). From
    a mantissa of 1.75 on it is one more: rounded to the type's one bit of mantissa, such a number
    is the next power of two (as in compressed-tensors; a plain floor would clip it).

    Kept within 2^-126 .. 2^127, since 2^-127 is no normal float32; a group of zeros gets 2^-126.
    """
    mantissa, power = torch.frexp(largest.float())  # mantissa within [0.5, 1)
    biased = power - 1 + (mantissa >= 1.75 / 2).int() - exponent
    biased = torch.where(largest > 0, biased, -126).clamp(-126, 127)
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float32), biased)


def round_mx(x: torch.Tensor, *, group: int, kind: str) -> torch.Tensor:
    """Round x `[M, K]` to an MX format: "e2m1" or "e4m3" with a power of two per `group`."""
    parts = grouped(x.float(), group)
    cast, exponent = (e2m1, E2M1_EXPONENT) if kind == "e2m1" else (e4m3, E4M3_EXPONENT)
    scales = power_of_two(parts.abs().amax(dim=2), exponent).unsqueeze(2)
    return (cast(parts / scales) * scales).view(x.shape[0], -1)[:, : x.shape[1]]


class RoundedInputs(Prepared):
    """Rounds what comes in, then multiplies by a prepared weight."""

    __slots__ = ("product", "rounded", "routine")

    def __init__(
        self, product: Prepared, rounded: Callable[[torch.Tensor], torch.Tensor], routine: Use
    ) -> None:
        """Round x `[M, K]` by `rounded` before `product`."""
        self.product = product
        self.rounded = rounded
        self.routine = routine

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`; in float32 in between, so that nothing is rounded twice."""
        note(self.routine)
        if not x.numel():
            return self.product(x)
        flat = x.reshape(-1, x.shape[-1])
        # What is no number stays none: rounded to one, it would hide a model that has overflowed.
        rounded = self.rounded(flat).where(flat.isfinite(), float("nan"))
        return self.product(rounded.view(x.shape)).to(x.dtype)

    @property
    def weight(self) -> Any:
        """The stored weight, where the product keeps it."""
        return self.product.weight  # type: ignore[attr-defined]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the product."""
        return self.product.tensors()

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, which nothing rounds further."""
        return self.product.rows(index)


def simulating(op: Op[W], name: str, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Op[W]:
    """`op` with its inputs rounded by `rounded` (`[M, K]` to float32 `[M, K]`), as the op `name`."""
    routine = Use(name, "simulated: activations rounded in torch")

    def after(way: Implementation[W]) -> Implementation[W]:
        return Implementation(
            name=way.name,
            detail=f"{routine.routine}, then {way.detail}",
            needs=way.needs,
            supports=way.supports,
            prepare=lambda weight: RoundedInputs(way.prepare(weight), rounded, routine),
        )

    return Op(name, tuple(after(way) for way in op.implementations))


def rounding_mx(group: int, kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """`round_mx` with its options filled in."""
    return partial(round_mx, group=group, kind=kind)
