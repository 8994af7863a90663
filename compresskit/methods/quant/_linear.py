"""What all weight quantisers share: replace layers one by one and account for it.

    dense weight --Scheme.quantise, a slab of rows at a time--> stored codes --prepare--> PackedLinear
                            |
                            +--> squared error, added up over the model by `Packing`

A layer's dense weight is dropped as soon as its packed one stands, so the peak stays near the
size of the dense model. What could not be quantised (embeddings, norms, a skipped layer) is named
in the facts with its bytes, and the bits per parameter count all of it.

A quantiser that looks at rows alone hands a `Scheme` to `quantise_linears`. One that needs data
computes each layer's stored weight itself and gives it to a `Packing`.
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
    from compresskit.method import Progress
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


class PackedLinear(nn.Module):
    """A linear layer on a prepared weight; inference only.

    `input_scale` `[K]` multiplies the activations first: what a method has moved from them into
    the weight (AWQ, SmoothQuant) and could not fold into the layer before.

    The tensors are in a plain attribute, not in buffers: quicker to reach, never cast by
    `model.to(dtype)`, and not in the state dict (a packed layout follows the machine).
    """

    def __init__(
        self,
        weight: Prepared,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        input_scale: torch.Tensor | None = None,
    ) -> None:
        """Take a prepared weight of `shape` (N, K)."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.product = weight
        self.bias = bias
        self.input_scale = input_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x `[..., K]` times the transposed weight plus the bias."""
        if self.input_scale is not None:
            x = x * self.input_scale
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def held_bytes(self) -> dict[str, int]:
        """Bytes of the codes, the scales, the zero points, the bias and the input scale."""
        held = dict(self.product.held_bytes())
        if self.bias is not None:
            held["bias"] = self.bias.nbytes
        if self.input_scale is not None:
            held["scales"] = held.get("scales", 0) + self.input_scale.nbytes
        return held

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors behind `held_bytes`."""
        extra = [t for t in (self.bias, self.input_scale) if t is not None]
        return [*self.product.tensors().values(), *extra]

    def extra_repr(self) -> str:
        """Shape and implementation, for printing a model."""
        kind = type(self.product).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, product={kind}"


class PackedEmbedding(nn.Module):
    """An embedding on a prepared weight: rows are dequantised as they are looked up."""

    def __init__(
        self, weight: Prepared, shape: tuple[int, int], dtype: torch.dtype, *, shared: bool,
        factor: float = 1.0,
    ) -> None:  # fmt: skip
        """Take a prepared weight of `shape` (V, E); `shared`: the output head holds and counts it.

        `factor` multiplies the rows, as some architectures do (Gemma: the root of E).
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.product = weight
        self.dtype = dtype
        self.shared = shared
        self.factor = factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `[..., E]` of the token ids `[...]`."""
        rows = self.product.rows(ids).to(self.dtype)
        return rows if self.factor == 1.0 else rows * self.factor

    def held_bytes(self) -> dict[str, int]:
        """Bytes by role; none where the head counts them."""
        return {} if self.shared else self.product.held_bytes()

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors behind `held_bytes`."""
        return [] if self.shared else list(self.product.tensors().values())


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


def quantise_linears(
    system: System,
    scheme_of: Callable[[Site], Scheme[Any]],
    *,
    with_head: bool,
    skip: tuple[str, ...],
    with_embeddings: bool = False,
    progress: Progress | None = None,
) -> System:
    """Replace the chosen linear layers of `system.model` in place; return the system with facts."""
    model = system.model
    sites = select(model, with_head=with_head, skip=skip)
    packing = Packing(system)
    total = len(sites)
    embedding = _embedding(model, with_head=with_head) if with_embeddings else None
    top = modules.head(model)
    tied: list[Prepared] = []

    def replaced(site: Site) -> PackedLinear:
        layer = packing.pack(site, scheme_of(site))
        if site.module is top and modules.is_tied(model):
            tied.append(layer.product)
        if progress is not None:
            progress("quantise", len(packing.done), total)
        return layer

    modules.replace_each(sites, replaced)
    if embedding is not None:
        _replace_embedding(packing, embedding, scheme_of(embedding), tied)
    return packing.finish()


def _embedding(model: nn.Module, *, with_head: bool) -> Site:
    """The input embedding as a site; refuses what could not be packed without breaking the head."""
    found = modules.embedding(model)
    if modules.is_tied(model) and not with_head:
        raise SpecError(
            "embeddings: the embedding shares its weight with the output head, so both are packed "
            "or none. Set head to true too."
        )
    return found


def _replace_embedding(
    packing: Packing, site: Site, scheme: Scheme[Any], tied: list[Prepared]
) -> None:
    weight = site.weight()
    product = tied[0] if tied else packing.prepare(site.name, scheme, weight)
    rows, width = weight.shape
    factor = float(getattr(site.module, "embed_scale", 1.0))
    site.replace(
        PackedEmbedding(product, (rows, width), weight.dtype, shared=bool(tied), factor=factor)
    )


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


def select(model: nn.Module, *, with_head: bool, skip: tuple[str, ...]) -> list[Site]:
    """The linear layers to quantise, in the order of the model.

    Raises:
        SpecError: a pattern of `skip` matches nothing.
        Conflict: nothing is left.
    """
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
