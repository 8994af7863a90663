"""Routed experts that a model keeps as one 3-D parameter: packed one expert at a time.

transformers holds the experts of a layer as `gate_up_proj` (or `up_proj`) and `down_proj`, each
`[X, out, in]` or transposed, in a module that says so in its attributes. Its fast implementations
index those parameters, so the whole module is replaced by a loop over the experts that the router
has chosen, each with two packed linear layers. What gates an expert stays the model's own code.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compresskit.hf import modules
from compresskit.methods.quant._packed import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.hf.modules import Site
    from compresskit.method import Progress
    from compresskit.methods.quant._packing import Packing, Scheme


class PackedExperts(nn.Module):
    """The experts of one layer on packed weights; inference only."""

    def __init__(self, experts: Any, first: list[PackedLinear], second: list[PackedLinear]) -> None:
        """Take over from `experts`, whose parameters have been dropped."""
        super().__init__()
        self.first, self.second = nn.ModuleList(first), nn.ModuleList(second)
        self.gate: Callable[[torch.Tensor], torch.Tensor] = (
            experts._apply_gate if experts.has_gate else experts.act_fn
        )

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the chosen experts' outputs, `[M, E]`.

        hidden `[M, E]`; chosen int64 `[M, k]`, an index past the last expert means none; shares
        `[M, k]`.
        """
        out = torch.zeros_like(hidden)
        for expert in sorted(set(chosen.flatten().tolist())):
            if expert >= len(self.first):
                continue
            rows, place = torch.where(chosen == expert)
            inner = self.gate(self.first[expert](hidden[rows]))
            part = self.second[expert](inner) * shares[rows, place, None]
            out.index_add_(0, rows, part.to(out.dtype))
        return out


def pack_experts(
    packing: Packing,
    scheme_of: Callable[[Site], Scheme[Any]],
    *,
    skip: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> None:
    """Replace every module of fused experts that `skip` does not name."""
    sites = [
        site
        for site in modules.experts(packing.system.model)
        if not any(fnmatchcase(site.name, pattern) for pattern in skip)
    ]
    for index, site in enumerate(sites):
        site.replace(_packed(packing, site, scheme_of))
        modules.release_freed()
        if progress is not None:
            progress("experts", index + 1, len(sites))


def _packed(
    packing: Packing, site: Site, scheme_of: Callable[[Site], Scheme[Any]]
) -> PackedExperts:
    experts: Any = site.module
    halves = []
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        scheme = scheme_of(site._replace(name=f"{site.name}.{name}"))
        stacked = getattr(experts, name).detach()
        biases = getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
        layers = []
        for index in range(stacked.shape[0]):
            exact = stacked[index].t() if experts.is_transposed else stacked[index]
            product = packing.prepare(f"{site.name}.{index}.{name}", scheme, exact)
            bias = None if biases is None else biases[index].clone()
            rows, width = exact.shape
            layers.append(PackedLinear(product, bias, (rows, width)))
        halves.append(layers)
        del stacked, biases
        delattr(experts, name)
        if experts.has_bias:
            delattr(experts, f"{name}_bias")
    return PackedExperts(experts, *halves)
