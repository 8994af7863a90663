"""What all weight quantisers share: replace linear layers one by one and account for it.

    dense weight --quantise, a slab of rows at a time--> stored codes --prepare--> PackedLinear
                            |
                            +--> squared error, added up over the model

A layer's dense weight is dropped as soon as its packed one stands, so the peak stays near the
size of the dense model. What could not be quantised (experts in one 3-D parameter, embeddings,
norms) is named in the facts with its bytes, and the bits per parameter count all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import torch
from compresskit_kernels.dispatch import Op, Prepared, choose
from torch import nn

from compresskit.errors import Conflict, RunError, SpecError
from compresskit.hf import modules

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic import JsonValue

    from compresskit.hf.modules import Site
    from compresskit.system import System

SLAB = 1 << 20
"""Weights quantised at a time: 4 MB in float32, times a handful of temporaries."""

ON_GRID = 1e-2
"""Relative weight error below which 4 bits are too good to be true: the layer was already rounded
to this very grid. Rounding anew costs 0.06 (uniform weights) to 0.16; on the grid only the
bfloat16 rounding of scales and offsets is left, up to 0.004."""


class Stored(Protocol):
    """A quantised weight as the operation stores it."""

    def dequantise(self) -> torch.Tensor:
        """The weight in float32."""

    @classmethod
    def join(cls, parts: Sequence[Any]) -> Self:
        """Stack weights on top of each other."""


S = TypeVar("S", bound=Stored)


@dataclass(frozen=True)
class Scheme(Generic[S]):
    """One way to quantise a weight, and the operation that multiplies by the result."""

    op: Op[S]
    bits: int
    quantise: Callable[[torch.Tensor], S]
    """float32 `[n, K]` -> stored rows; each row must stand alone."""


class PackedLinear(nn.Module):
    """A linear layer on a prepared weight; inference only.

    The tensors are in a plain attribute, not in buffers: quicker to reach, never cast by
    `model.to(dtype)`, and not in the state dict (a packed layout follows the machine).
    """

    def __init__(self, weight: Prepared, bias: torch.Tensor | None, shape: tuple[int, int]) -> None:
        """Take a prepared weight of `shape` (N, K)."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.product = weight
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x `[..., K]` times the transposed weight plus the bias."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def held_bytes(self) -> dict[str, int]:
        """Bytes of the codes, the scales, the zero points and the bias."""
        held = self.product.held_bytes()
        return held if self.bias is None else {**held, "bias": self.bias.nbytes}

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors behind `held_bytes`."""
        held = list(self.product.tensors().values())
        return held if self.bias is None else [*held, self.bias]

    def extra_repr(self) -> str:
        """Shape and implementation, for printing a model."""
        kind = type(self.product).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, product={kind}"


def quantise_linears(
    system: System, scheme: Scheme[S], *, with_head: bool, skip: tuple[str, ...]
) -> System:
    """Replace the chosen linear layers of `system.model` in place; return the system with facts."""
    model = system.model
    sites = _select(model, with_head=with_head, skip=skip)
    parameters = modules.parameter_count(model)
    done: list[_Done] = []

    def pack(site: Site) -> PackedLinear:
        layer, outcome = _quantise(site, scheme)
        done.append(outcome)
        return layer

    modules.replace_each(sites, pack)
    modules.leave_checkpoint(model)
    energy = sum(outcome.energy for outcome in done)
    error = sum(outcome.error for outcome in done)
    on_grid = sum(outcome.error < ON_GRID**2 * outcome.energy for outcome in done)
    implementations = sorted({outcome.implementation for outcome in done})
    facts: dict[str, JsonValue] = {
        **system.facts,
        "effective_bits_per_parameter": 8 * modules.weight_bytes(model) / parameters,
        "quantized_parameters": sum(outcome.parameters for outcome in done),
        "weight_error": math.sqrt(error / energy) if energy else 0.0,
        "left_dense": dict(modules.left_dense(model)),
    }
    if scheme.bits <= 4 and on_grid:
        facts["warnings"] = [*_warnings(system), _on_grid(on_grid, len(done), scheme.bits)]
    kernels = {**system.kernels, scheme.op.name: "; ".join(implementations)}
    return replace(system, facts=facts, kernels=kernels)


@dataclass(frozen=True)
class _Done:
    """What is remembered of a layer: no tensors, so that nothing dense is kept alive."""

    implementation: str
    parameters: int
    error: float
    """Squared Frobenius norm of the rounding error."""
    energy: float
    """Squared Frobenius norm of the weight."""


def _quantise(site: Site, scheme: Scheme[S]) -> tuple[PackedLinear, _Done]:
    weight = site.weight()
    rows, width = weight.shape
    parts: list[S] = []
    error = energy = 0.0
    for slab in torch.split(weight, max(1, SLAB // max(1, width))):
        exact = slab.float()
        part = scheme.quantise(exact)
        error += float((part.dequantise() - exact).square().sum(dtype=torch.float64))
        energy += float(exact.square().sum(dtype=torch.float64))
        parts.append(part)
    if not math.isfinite(error):
        raise RunError(
            f"The weight of {site.name} holds NaN or infinity, or overflows bfloat16 scales; "
            f"it cannot be quantised. Leave it out with skip = ['{site.name}']."
        )
    stored = parts[0] if len(parts) == 1 else type(parts[0]).join(parts)
    way = choose(scheme.op, weight)
    layer = PackedLinear(way.prepare(stored), site.bias(), (rows, width))
    return layer, _Done(way.detail, weight.numel(), error, energy)


def _select(model: nn.Module, *, with_head: bool, skip: tuple[str, ...]) -> list[Site]:
    sites = modules.linears(model)
    for pattern in skip:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise SpecError(
                f"skip: {pattern!r} matches no linear layer. "
                f"Names look like {', '.join(repr(site.name) for site in sites[:3]) or 'none'}."
            )
    top = modules.head(model)
    chosen = [
        site
        for site in sites
        if (with_head or site.module is not top)
        and not any(fnmatchcase(site.name, pattern) for pattern in skip)
    ]
    if not chosen:
        raise Conflict("The model has no linear layer left to quantise.")
    return chosen


def _warnings(system: System) -> list[JsonValue]:
    before = system.facts.get("warnings", [])
    return list(before) if isinstance(before, list) else [before]


def _on_grid(count: int, total: int, bits: int) -> str:
    return (
        f"baseline already on this grid: {count} of {total} layers lose less than {ON_GRID:.0%} of "
        f"their weight at {bits} bits, so quality says nothing about full-precision weights. "
        "Use another group size or scheme."
    )
