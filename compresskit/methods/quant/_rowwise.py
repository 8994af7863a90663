"""Quantisers that look at nothing but a weight's rows: how each layer is rounded is known beforehand.

method.rounding(model)          a scheme for each layer
pack_each(method, system)       packed layers, each made by its scheme

Whoever wants the rounded weights without packing them (training, say) asks for the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.methods.quant._base import AbstractQuant
from compresskit.methods.quant._linear import quantise_linears

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.hf.modules import Site
    from compresskit.method import Context
    from compresskit.methods.quant._linear import Scheme
    from compresskit.system import System


class Rounding(NamedTuple):
    """How a method rounds a certain model."""

    scheme_of: Callable[[Site], Scheme[Any]]
    """For a linear layer, one parameter of fused experts (named with its module), or the embedding."""
    skip: tuple[str, ...]
    """Patterns of the layers that stay dense; an embedding is not asked about."""


class AbstractRowwise(AbstractQuant, ABC):
    """A quantiser that needs neither data nor other layers to round one."""

    @abstractmethod
    def rounding(self, model: Any) -> Rounding:
        """How the weights of `model` are rounded, which is left as it is.

        Raises:
            SpecError: the parameters do not suit it.
        """


def pack_each(method: AbstractRowwise, system: System, ctx: Context) -> System:
    """Replace the layers of `system` in place, each rounded as `method` says."""
    rounding = method.rounding(system.model)
    return quantise_linears(
        system,
        rounding.scheme_of,
        with_head=method.head,
        skip=rounding.skip,
        with_embeddings=method.embeddings,
        progress=ctx.progress,
    )
