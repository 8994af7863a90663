"""Replace the linear layers of a model one by one: what all row-wise weight quantisers share.

A layer's dense weight is dropped as soon as its packed one stands, so the peak stays near the
size of the dense model. What could not be quantised (embeddings, norms, a skipped layer) is named
in the facts with its bytes, and the bits per parameter count all of it.

A quantiser that looks at rows alone hands a `Scheme` to `quantise_linears`. One that needs data
computes each layer's stored weight itself and gives it to a `Packing`.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from compresskit.errors import Conflict, SpecError
from compresskit.hf import modules
from compresskit.methods.quant._experts import pack_experts
from compresskit.methods.quant._packed import PackedEmbedding, PackedLinear
from compresskit.methods.quant._packing import Packing, Scheme, Stored, warnings

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit_kernels.dispatch import Prepared
    from torch import nn

    from compresskit.hf.modules import Site
    from compresskit.method import Progress
    from compresskit.system import System

__all__ = [
    "PackedEmbedding", "PackedLinear", "Packing", "Scheme", "Stored", "find_embedding",
    "quantise_linears", "replace_embedding", "select", "warnings",
]  # fmt: skip


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
    embedding = find_embedding(model, with_head=with_head) if with_embeddings else None
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
    pack_experts(packing, scheme_of, skip=skip, progress=progress)
    if embedding is not None:
        replace_embedding(packing, embedding, scheme_of(embedding), tied)
    return packing.finish()


def find_embedding(model: nn.Module, *, with_head: bool) -> Site:
    """The input embedding as a site; refuses what could not be packed without breaking the head."""
    found = modules.embedding(model)
    if modules.is_tied(model) and not with_head:
        raise SpecError(
            "embeddings: the embedding shares its weight with the output head, so both are packed "
            "or none. Set head to true too."
        )
    return found


def replace_embedding(
    packing: Packing, site: Site, scheme: Scheme[Any], tied: list[Prepared]
) -> None:
    weight = site.weight()
    product = tied[0] if tied else packing.prepare(site.name, scheme, weight)
    rows, width = weight.shape
    factor = float(getattr(site.module, "embed_scale", 1.0))
    site.replace(
        PackedEmbedding(product, (rows, width), weight.dtype, shared=bool(tied), factor=factor)
    )


def select(model: nn.Module, *, with_head: bool, skip: tuple[str, ...]) -> list[Site]:
    """The linear layers to quantise, in the order of the model.

    Raises:
        SpecError: a pattern of `skip` matches nothing.
        Conflict: nothing is left.
    """
    sites = modules.linears(model)
    named = [*sites, *modules.experts(model)]
    for pattern in skip:
        if not any(fnmatchcase(site.name, pattern) for site in named):
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
