"""What linear layers are given during calibration, in numbers.

    x of every token --> `Moments`: sums of |x| and of x xᵀ, the largest |x|, a few tokens as such

Layers that are given the very same tensor (queries, keys and values; gate and up) form one `Shared`
with one set of statistics. Everything is added up in float32, whatever the model computes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.errors import RunError
from compresskit.methods.quant._packing import SLAB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from compresskit.hf.modules import Site


@dataclass
class Moments:
    """Statistics of the inputs of a linear layer with K inputs, float32."""

    count: int
    """Tokens seen."""
    absolute: torch.Tensor
    """Sum of |x|, `[K]`."""
    largest: torch.Tensor
    """Largest |x|, `[K]`."""
    products: torch.Tensor | None
    """Sum of x xᵀ, `[K, K]`, where asked for."""
    tokens: torch.Tensor
    """Some of the inputs, `[M, K]`."""

    @classmethod
    def empty(cls, width: int, device: torch.device, *, products: bool) -> Moments:
        """Nothing seen yet."""
        zeros = torch.zeros(width, device=device)
        square = torch.zeros(width, width, device=device) if products else None
        return cls(0, zeros, zeros.clone(), square, zeros.new_empty(0, width))

    def add(self, x: torch.Tensor, keep: int = 0) -> None:
        """Count inputs `[..., K]` in; keep `keep` of them, evenly spread."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        size = flat.abs()
        self.count += flat.shape[0]
        self.absolute += size.sum(dim=0)
        if flat.shape[0]:
            torch.maximum(self.largest, size.amax(dim=0), out=self.largest)
        if self.products is not None:
            self.products.addmm_(flat.t(), flat)
        if keep:
            step = max(1, flat.shape[0] // keep)
            self.tokens = torch.cat([self.tokens, flat[::step][:keep]])

    def mean(self) -> torch.Tensor:
        """Mean of |x|, `[K]`."""
        return self.absolute / max(1, self.count)

    def hessian(self) -> torch.Tensor:
        """Mean of x xᵀ, `[K, K]`: half the Hessian of the layer's mean squared output error."""
        if self.products is None:
            raise ValueError("no products were collected")
        return self.products / max(1, self.count)

    def error(self, difference: torch.Tensor) -> float:
        """Squared output error of a weight that is off by `difference` `[N, K]`, a token."""
        hessian, total = self.hessian(), 0.0
        for rows in torch.split(difference, max(1, SLAB // max(1, difference.shape[1]))):
            total += float(((rows @ hessian) * rows).sum(dtype=torch.float64))
        return total


class Shared(NamedTuple):
    """Linear layers that are given the very same input."""

    sites: list[Site]
    moments: Moments
    producers: list[nn.Module]
    """Modules with a gain a channel whose output that input is: norms."""


class Collector:
    """Records, while a block runs, what its linear layers are given."""

    def __init__(self, sites: list[Site], *, products: bool, keep: int) -> None:
        """Watch `sites`; `keep` tokens a batch are kept as such."""
        self.sites = {site.name: site for site in sites}
        self.products, self.keep = products, keep
        self.moments: dict[frozenset[str], Moments] = {}
        self.producers: dict[frozenset[str], list[nn.Module]] = {}
        self._inputs: dict[tuple[int, ...], tuple[torch.Tensor, set[str]]] = {}
        self._outputs: dict[tuple[int, ...], tuple[torch.Tensor, list[nn.Module]]] = {}

    def over(self, block: nn.Module, run: Callable[[], Any]) -> Any:
        """Run the block on one batch under observation; return what it returns."""
        handles = [
            site.module.register_forward_pre_hook(self._reader(name))
            for name, site in self.sites.items()
        ]
        handles += [
            module.register_forward_hook(self._noted)
            for module in block.modules()
            if _gain(module) is not None
        ]
        try:
            result = run()
        finally:
            for handle in handles:
                handle.remove()
        # The tensors were kept alive up to here, so that no two of them had one address.
        for key, (x, names) in self._inputs.items():
            self.take(frozenset(names), x)
            if key in self._outputs:
                self.producers[frozenset(names)] = self._outputs[key][1]
        self._inputs.clear()
        self._outputs.clear()
        return result

    def take(self, names: frozenset[str], x: torch.Tensor) -> None:
        """Count `x` as the input of the layers `names`."""
        if names not in self.moments:
            self.moments[names] = Moments.empty(x.shape[-1], x.device, products=self.products)
        self.moments[names].add(x, self.keep)

    def result(self) -> list[Shared]:
        """The layers by input; layers that were not always called together stand alone."""
        sets: dict[str, list[frozenset[str]]] = {name: [] for name in self.sites}
        for names in self.moments:
            for name in names:
                sets[name].append(names)
        found: list[Shared] = []
        together: set[str] = set()
        for names in self.moments:
            if all(sets[name] == [names] for name in names):
                sites = [site for name, site in self.sites.items() if name in names]
                found.append(Shared(sites, self.moments[names], self.producers.get(names, [])))
                together |= names
        for name, several in sets.items():
            if several and name not in together:
                found.append(Shared([self.sites[name]], _sum(self.moments, several), []))
        for one in found:
            if not bool(torch.isfinite(one.moments.absolute).all()):
                raise RunError(
                    f"The inputs of {one.sites[0].name} are not finite on the calibration text, so "
                    "nothing can be calibrated on them. Load the model in another dtype."
                )
        return found

    def _reader(self, name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # No tokens (an expert nobody was sent to) have no address of their own.
            if args[0].numel():
                self._inputs.setdefault(_place(args[0]), (args[0], set()))[1].add(name)

        return seen

    def _noted(self, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self._outputs.setdefault(_place(output), (output, []))[1].append(module)


def _sum(moments: dict[frozenset[str], Moments], several: Iterable[frozenset[str]]) -> Moments:
    parts = [moments[names] for names in several]
    products = [part.products for part in parts if part.products is not None]
    return Moments(
        sum(part.count for part in parts),
        torch.stack([part.absolute for part in parts]).sum(dim=0),
        torch.stack([part.largest for part in parts]).amax(dim=0),
        torch.stack(products).sum(dim=0) if products else None,
        torch.cat([part.tokens for part in parts]),
    )


def _place(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where a tensor's values lie; views of all of them count as the same."""
    return tensor.data_ptr(), tensor.numel()


def _gain(module: nn.Module) -> torch.Tensor | None:
    """The gain of something like a norm: a weight with one dimension."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 1 else None
