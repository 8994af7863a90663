"""Pack weights one by one, and account for what that did.

dense weight --Scheme.quantise, a slab of rows at a time--> stored codes --prepare--> product
                        |
                        +--> squared error, added up over the model by `Packing`
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import torch
from compresskit_kernels.dispatch import Op, Prepared, choose

from compresskit.errors import Conflict, RunError
from compresskit.hf import modules
from compresskit.methods.quant._packed import PackedLinear

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

    def store(self, weight: torch.Tensor) -> S:
        """Quantise a whole weight `[N, K]` of any floating-point type, a slab of rows at a time."""
        slabs = torch.split(weight, max(1, SLAB // max(1, weight.shape[1])))
        parts = [self.quantise(slab.float()) for slab in slabs]
        return parts[0] if len(parts) == 1 else type(parts[0]).join(parts)


@dataclass(frozen=True)
class _Done:
    """What is remembered of a layer: no tensors, so that nothing dense is kept alive."""

    op: str
    implementation: str
    parameters: int
    bits: int
    error: float
    """Squared Frobenius norm of the rounding error."""
    energy: float
    """Squared Frobenius norm of the weight."""


class Packing:
    """Packs the layers of a system one by one, and accounts for what that did."""

    def __init__(self, system: System) -> None:
        """Begin; the bits per parameter are of the model as it is now."""
        self.system = system
        self.parameters = modules.parameter_count(system.model)
        self.done: list[_Done] = []

    def pack(
        self,
        site: Site,
        scheme: Scheme[S],
        *,
        stored: S | None = None,
        exact: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
    ) -> PackedLinear:
        """Return the packed layer for `site`; the caller puts it in place.

        `stored` is the quantised weight where the method made it itself; `exact` `[N, K]` what it
        stands for (the site's weight, scaled by 1 / `input_scale` where one is given).

        Raises:
            RunError: the weight holds NaN or infinity.
        """
        exact = site.weight() if exact is None else exact
        product = self.prepare(site.name, scheme, exact, stored)
        rows, width = exact.shape
        return PackedLinear(product, site.bias(), (rows, width), input_scale)

    def prepare(
        self, name: str, scheme: Scheme[S], exact: torch.Tensor, stored: S | None = None
    ) -> Prepared:
        """Quantise `exact` `[N, K]` unless `stored` is given, choose an implementation, account."""
        if not bool(torch.isfinite(exact).all()):
            raise RunError(
                f"The weight of {name} holds NaN or infinity; it cannot be quantised. "
                f"Leave it out with skip = ['{name}']."
            )
        stored = scheme.store(exact) if stored is None else stored
        error, energy = _error(stored, exact)
        if not math.isfinite(error):
            raise RunError(
                f"The weight of {name} overflows its scales; it cannot be quantised. "
                f"Leave it out with skip = ['{name}']."
            )
        try:
            way = choose(scheme.op, exact, stored)
        except ValueError as refused:
            raise Conflict(f"{name}: {refused}") from refused
        self.done.append(
            _Done(scheme.op.name, way.detail, exact.numel(), scheme.bits, error, energy)
        )
        return way.prepare(stored)

    def finish(self, **facts: JsonValue) -> System:
        """Release what is no longer needed; return the system with the facts of it all."""
        model = self.system.model
        modules.leave_checkpoint(model)
        energy = sum(one.energy for one in self.done)
        error = sum(one.error for one in self.done)
        on_grid = sum(one.bits <= 4 and one.error < ON_GRID**2 * one.energy for one in self.done)
        kernels: dict[str, set[str]] = {}
        for one in self.done:
            kernels.setdefault(one.op, set()).add(one.implementation)
        added: dict[str, JsonValue] = {
            **self.system.facts,
            "effective_bits_per_parameter": 8 * modules.weight_bytes(model) / self.parameters,
            "quantized_parameters": sum(one.parameters for one in self.done),
            "weight_error": math.sqrt(error / energy) if energy else 0.0,
            "left_dense": dict(modules.left_dense(model)),
            **facts,
        }
        if on_grid:
            added["warnings"] = [*warnings(self.system), _on_grid(on_grid, len(self.done))]
        named = {op: "; ".join(sorted(ways)) for op, ways in kernels.items()}
        return replace(self.system, facts=added, kernels={**self.system.kernels, **named})


def _error(stored: Stored, exact: torch.Tensor) -> tuple[float, float]:
    """Squared norms of the rounding error and of the weight, a slab of rows at a time."""
    error = energy = 0.0
    step = max(1, SLAB // max(1, exact.shape[1]))
    take: Any = getattr(stored, "take", None)
    for start in range(0, exact.shape[0], step):
        rows = torch.arange(start, min(start + step, exact.shape[0]), device=exact.device)
        dense = exact[start : start + step].float()
        error += float((take(rows).dequantise() - dense).square().sum(dtype=torch.float64))
        energy += float(dense.square().sum(dtype=torch.float64))
    return error, energy


def warnings(system: System) -> list[JsonValue]:
    """What earlier methods wanted said."""
    before = system.facts.get("warnings", [])
    return list(before) if isinstance(before, list) else [before]


def _on_grid(count: int, total: int) -> str:
    return (
        f"baseline already on this grid: {count} of {total} layers lose less than {ON_GRID:.0%} of "
        "their weight at 4 bits or fewer, so quality says nothing about full-precision weights. "
        "Use another group size or scheme."
    )
