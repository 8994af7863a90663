"""The parts of a model that are rounded together, and how to round one and take it back.

A rounded weight is put in the place of the parameter, never written into it: taking it back puts
the very same parameter there again, so a model that was measured is the model it was, bit for bit,
and one part at a time is held twice.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from compresskit_kernels.packing import packed_bytes
from torch import nn

from compresskit.errors import SpecError
from compresskit.hf import modules
from compresskit.methods.quant._group import fit, group_size, grouped
from compresskit.methods.quant._linear import select
from compresskit.methods.quant._overrides import owners
from compresskit.methods.quant._packing import SLAB

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from compresskit.methods.quant._group import ZeroPoint

Granularity = Literal["layer", "part", "block", "kind"]


@dataclass(frozen=True)
class Weight:
    """A weight that is quantised, wherever it hangs."""

    name: str
    holders: tuple[tuple[nn.Module, str], ...]
    """Modules and the attribute it has there; two where embedding and head share it."""
    transposed: bool = False
    """Inputs run along the last dimension but one (Conv1D, some experts)."""

    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        module, attribute = self.holders[0]
        found: nn.Parameter = getattr(module, attribute)
        return found

    def rows(self) -> torch.Tensor:
        """The weight as `[N, K]`; experts on top of each other."""
        weight = self.parameter().detach()
        weight = weight.transpose(-1, -2) if self.transposed else weight
        return weight.reshape(-1, weight.shape[-1])

    def put(self, parameter: nn.Parameter) -> None:
        """Hang `parameter` in every place of this weight."""
        for module, attribute in self.holders:
            setattr(module, attribute, parameter)


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded to the grid of their group; any width."""

    group: int
    symmetric: bool
    zero_point: ZeroPoint = "float"

    def rounded(self, weight: Weight, bits: int) -> nn.Parameter:
        """`weight` at `bits`, in the type and the shape of the original."""
        rows = weight.rows()
        out = torch.empty_like(rows)
        size = group_size(self.group, rows.shape[1])
        step = max(1, SLAB // max(1, rows.shape[1]))
        for at in range(0, rows.shape[0], step):
            parts = grouped(rows[at : at + step].float(), size)
            grid = fit(parts, bits=bits, symmetric=self.symmetric, zero_point=self.zero_point)
            values = grid.values(grid.codes(parts)).flatten(1)[:, : rows.shape[1]]
            out[at : at + step] = values.to(out.dtype)
        shape = weight.parameter().shape
        if weight.transposed:
            out = out.view(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        return nn.Parameter(out.reshape(shape), requires_grad=False)

    def stored_bits(self, weight: Weight, bits: int) -> int:
        """Bits of the portable stored form: codes, scales, and offsets or zero points."""
        height, width = weight.rows().shape
        groups = -(-width // group_size(self.group, width))
        extra = 0 if self.symmetric else (16 if self.zero_point == "float" else 8)
        return height * (8 * packed_bytes(width, bits) + groups * (16 + extra))


def weights_of(
    model: Any, *, with_head: bool, with_embeddings: bool, skip: tuple[str, ...]
) -> list[Weight]:
    """Every weight that would be quantised, in the order of the model.

    Raises:
        SpecError: a pattern of `skip` matches nothing, or a tied embedding without its head.
        Conflict: nothing is left.
    """
    if with_embeddings and modules.is_tied(model) and not with_head:
        raise SpecError(
            "embeddings: the embedding shares its weight with the output head, so both are packed "
            "or none. Set head to true too."
        )
    sites = {site.name: site for site in select(model, with_head=with_head, skip=skip)}
    experts = {site.name: site for site in modules.experts(model)}
    table = modules.embedding(model) if with_embeddings else None
    shared = table is not None and modules.is_tied(model)
    top = modules.head(model)
    found = []
    for name, owner in owners(
        model, with_head=with_head, skip=skip, with_embeddings=with_embeddings
    ).items():
        if owner in sites:
            module = sites[owner].module
            holders = [(module, "weight")]
            if shared and table is not None and module is top:
                holders.append((table.module, "weight"))
            turned = not isinstance(module, nn.Linear)  # Conv1D
            found.append(Weight(name, tuple(holders), turned))
        elif owner in experts:
            module = experts[owner].module
            attribute = name.rpartition(".")[2]
            turned = bool(getattr(module, "is_transposed", False))
            found.append(Weight(name, ((module, attribute),), turned))
        elif table is not None:
            found.append(Weight(name, ((table.module, "weight"),)))
    return found


@contextmanager
def replaced(weights: Iterable[Weight], make: Callable[[Weight], nn.Parameter]) -> Iterator[None]:
    """Put `make(weight)` in the place of each weight; the originals come back whatever happens."""
    originals: list[tuple[Weight, nn.Parameter]] = []
    try:
        for weight in weights:
            originals.append((weight, weight.parameter()))
            weight.put(make(weight))
        yield
    finally:
        for weight, original in originals:
            weight.put(original)


def part_name(name: str, granularity: Granularity) -> str:
    """The part that the weight `name` belongs to.

    >>> name = "model.layers.3.mlp.down_proj"
    >>> for each in ("layer", "part", "block", "kind"):
    ...     print(part_name(name, each))
    model.layers.3.mlp.down_proj
    model.layers.3.mlp
    model.layers.3
    model.layers.*.mlp.down_proj
    """
    pieces = name.split(".")
    numbers = [index for index, piece in enumerate(pieces) if piece.isdecimal()]
    if granularity == "layer" or not numbers:
        return name
    if granularity == "part":
        return ".".join(pieces[:-1])
    if granularity == "block":
        return ".".join(pieces[: numbers[0] + 1])
    return ".".join("*" if piece.isdecimal() else piece for piece in pieces)


def pattern_of(part: str, members: Collection[str]) -> str:
    """A pattern for overrides that matches the weights of `part` and no others of their model."""
    return part if part in members or "*" in part else f"{part}.*"


def parts_of(weights: list[Weight], granularity: Granularity) -> dict[str, list[Weight]]:
    """Parts and their weights, in the order of the model."""
    parts: dict[str, list[Weight]] = {}
    for weight in weights:
        parts.setdefault(part_name(weight.name, granularity), []).append(weight)
    return parts
