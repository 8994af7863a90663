"""Linear layers of other libraries in place of dense ones, accounted for as ours are.

    dense layer --convert--> Converted(the library's layer, its tensors, what it rounded to)
                                |
                                +--> ForeignLinear: runs it, answers for its bytes, notes that it ran

The library's layer hangs in a plain attribute, out of the module tree: its weight may be a tensor
subclass whose storage is not what torch reports, and its class may be `nn.Linear`, which the search
for dense layers would find.

A layer that the library cannot take (`Unfit`) stays dense and is named in a warning; if it takes
none, the whole method is refused with the library's own reason.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from compresskit_kernels.dispatch import Use, note
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from compresskit.errors import Conflict, RunError, SpecError
from compresskit.hf import modules
from compresskit.methods.quant._linear import select
from compresskit.methods.quant._packing import SLAB, Packing, _Done, warnings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.hf.modules import Site
    from compresskit.method import Context
    from compresskit.methods.quant._base import AbstractQuant
    from compresskit.system import System


class Unfit(Exception):
    """The library cannot take this layer; the text says why."""


class Converted(NamedTuple):
    """A layer as the library has it."""

    layer: nn.Module
    tensors: Callable[[nn.Module], dict[str, list[torch.Tensor]]]
    """Role -> the plain tensors that `layer` holds now, its bias included."""
    rounded: torch.Tensor
    """What the weight became, `[N, K]` floating-point."""
    routine: str
    """What runs."""
    bits: int


class ForeignLinear(nn.Module):
    """A linear layer of another library; inference only."""

    def __init__(self, made: Converted, op: str, shape: tuple[int, int]) -> None:
        """Take a converted layer of `shape` (N, K)."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.hidden = (made.layer,)
        self.find = made.tensors
        self.routine = Use(op, made.routine)

    @property
    def layer(self) -> nn.Module:
        """The library's layer."""
        return self.hidden[0]

    @property
    def product(self) -> object:
        """What an audit names: the library's kind of weight, or of layer where that has none."""
        return getattr(self.layer, "weight", self.layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the library computes for x `[..., K]`."""
        note(self.routine)
        y: torch.Tensor = self.layer(x)
        return y

    def held_bytes(self) -> dict[str, int]:
        """Bytes by role, each storage once."""
        seen: set[int] = set()
        held: dict[str, int] = {}
        for role, tensors in self.find(self.layer).items():
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    held[role] = held.get(role, 0) + storage.nbytes()
        return held

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors behind `held_bytes`."""
        return [tensor for tensors in self.find(self.layer).values() for tensor in tensors]

    def extra_repr(self) -> str:
        """Shape and routine, for printing a model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"runs={self.routine.routine!r}"
        )


def leaves(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors inside `tensor`, with the names its class gives them."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from leaves(inner, getattr(tensor, inner))


def replace_linears(
    method: AbstractQuant,
    system: System,
    ctx: Context,
    convert: Callable[[Site], Converted],
    *,
    op: str,
    warned: tuple[str, ...] = (),
) -> System:
    """Replace the chosen layers of `system.model` by converted ones; return the system with facts.

    Raises:
        SpecError: embeddings were asked for, or a pattern of `skip` matches nothing.
        Conflict: the library can take none of the layers.
        RunError: a weight holds NaN or infinity.
    """
    if method.embeddings:
        raise SpecError(f"embeddings: {op} has linear layers only. Leave embeddings at false.")
    model = system.model
    sites = select(model, with_head=method.head, skip=method.skip)
    total = len(sites)
    packing = Packing(system)
    refused: dict[str, list[str]] = {}
    dense_bytes = held_bytes = tried = 0

    def replaced(site: Site) -> nn.Module:
        nonlocal dense_bytes, held_bytes, tried
        tried += 1
        ctx.progress("quantise", tried, total)
        exact = site.weight()
        _refuse_nonfinite(site.name, exact)
        try:
            made = convert(site)
        except Unfit as reason:
            refused.setdefault(str(reason), []).append(site.name)
            return site.module
        error, energy = _difference(made.rounded, exact)
        packing.done.append(_Done(op, made.routine, exact.numel(), made.bits, error, energy))
        rows, width = exact.shape
        layer = ForeignLinear(made, op, (rows, width))
        dense_bytes += exact.nbytes
        held_bytes += sum(layer.held_bytes().values())
        return layer

    modules.replace_each(sites, replaced)
    if not packing.done:
        raise Conflict(f"{op}: {next(iter(refused))}")
    said = [*warnings(system), *warned, *(_left(total, *one) for one in refused.items())]
    if modules.experts(model):
        said.append(f"the routed experts stay dense: {op} replaces linear layers only.")
    if said:
        packing.system = replace(system, facts={**system.facts, "warnings": list(said)})
    done = packing.finish()
    if held_bytes >= dense_bytes:  # a fake quantiser: it rounds, and keeps the floats
        done = replace(done, simulated=(*done.simulated, op))
    return done


def copied_bias(site: Site) -> nn.Parameter | None:
    """The bias of a layer, in memory of its own rather than the checkpoint's."""
    bias = site.bias()
    return None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)


def bitsandbytes() -> Any:
    """Import bitsandbytes without its look-up of kernels on the network, and quietly.

    With the package `kernels` at hand the import asks the Hub for a product of its own, which would
    make a run depend on the network and on the day. Its layers also log a line in every call.
    """
    for chatty in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def _refuse_nonfinite(name: str, weight: torch.Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise RunError(
            f"The weight of {name} holds NaN or infinity; it cannot be quantised. "
            f"Leave it out with skip = ['{name}']."
        )


def _difference(rounded: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Squared norms of the rounding error and of the weight, a slab of rows at a time."""
    error = energy = 0.0
    step = max(1, SLAB // max(1, exact.shape[1]))
    for start in range(0, exact.shape[0], step):
        dense = exact[start : start + step].float()
        got = rounded[start : start + step].float()
        error += float((got - dense).square().sum(dtype=torch.float64))
        energy += float(dense.square().sum(dtype=torch.float64))
    return error, energy


def _left(total: int, reason: str, names: list[str]) -> str:
    return f"{len(names)} of {total} layers left dense ({names[0]} first): {reason}"
