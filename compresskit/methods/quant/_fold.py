"""Fold a scale of a linear layer's inputs into whatever produces them.

    x @ Wᵀ  =  (x / s) @ (W * s)ᵀ        and x / s comes for free where the producer can be divided

The producer is a norm (its gain and bias take 1 / s; Gemma's gain is 1 + its weight) or another
linear layer (its rows take it). Whether that is right is not read off an architecture, it is tried
out: the block runs on a few tokens in float32 with random powers of two for s, once as it is and
once folded. Powers of two scale floats without rounding, so a right fold changes nothing, while a
wrong one (another consumer, a nonlinearity in between, experts behind the same norm) changes
everything. What cannot be folded is applied at run time.

A folded gain is rounded to the model's type. The scale is then recomputed from what was stored, so
that rounding moves s and not the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.hf.blocks import Call
    from compresskit.hf.modules import Site
    from compresskit.methods.quant._moments import Shared

Kind = Literal["gain", "one_plus_gain", "rows"]

TOLERANCE = 1e-3
"""Largest change of what a block adds to its input, relative; a right fold leaves about 1e-7."""


class Fold(NamedTuple):
    """Where the scale of a `Shared` can go."""

    producer: nn.Module
    kind: Kind

    def divide(self, scale: torch.Tensor) -> torch.Tensor:
        """Divide the gain of a norm by `scale` `[K]` in place; return the scale as it came out.

        A channel whose gain is zero keeps it, and its scale.
        """
        own = self.producer._parameters
        weight, bias = own["weight"], own.get("bias")
        assert weight is not None
        one = 1.0 if self.kind == "one_plus_gain" else 0.0
        gain = weight.detach().float() + one
        new = (gain / scale - one).to(weight.dtype)
        came_out = new.float() + one
        usable = (came_out != 0) & (gain != 0)
        real = torch.where(usable, gain / came_out.where(usable, 1.0), 1.0)
        weight.data = torch.where(usable, new, weight.detach())
        if bias is not None:
            bias.data = (bias.detach().float() / real).to(bias.dtype)
        return real


class Bench:
    """Tries folds out on one block, in float32."""

    def __init__(self, block: nn.Module, call: Call, seed: int) -> None:
        """Run `block` as it is on `call`, a few tokens."""
        self.block, self.seed = block, seed
        self.call = call._replace(
            hidden=call.hidden.float(), args=_float(call.args), kwargs=_float(call.kwargs)
        )
        tensors = [*block.named_parameters(), *block.named_buffers()]
        self.state = {name: _float(tensor.detach()) for name, tensor in tensors}
        self.names = {id(module): name for name, module in block.named_modules()}
        self.before = self._run({})
        self.added = float((self.before - self.call.hidden).norm())

    def fold(self, shared: Shared, others: Sequence[Site]) -> Fold | None:
        """Where the scale of `shared` can go: into a norm, or into the rows of one of `others`."""
        width = shared.moments.absolute.numel()
        kinds: tuple[Kind, ...] = ("gain", "one_plus_gain")
        candidates = [Fold(norm, kind) for norm in shared.producers for kind in kinds]
        candidates += [
            Fold(site.module, "rows")
            for site in others
            if site.weight().shape[0] == width and site not in shared.sites
        ]
        return next((one for one in candidates if self.holds(one, shared.sites)), None)

    def holds(self, fold: Fold, consumers: Sequence[Site]) -> bool:
        """Whether the block still computes the same with a random scale folded that way."""
        width = consumers[0].weight().shape[1]
        generator = torch.Generator().manual_seed(self.seed)
        powers = torch.randint(-2, 3, (width,), generator=generator)
        scale = torch.exp2(powers.float()).to(self.before.device)
        changed: dict[str, torch.Tensor] = {}
        for site in consumers:
            self._set(changed, site.module, columns=scale)
        self._set(changed, fold.producer, divisor=scale, kind=fold.kind)
        off = float((self._run(changed) - self.before).norm())
        return off <= TOLERANCE * self.added

    def _set(
        self,
        changed: dict[str, torch.Tensor],
        module: nn.Module,
        *,
        columns: torch.Tensor | None = None,
        divisor: torch.Tensor | None = None,
        kind: Kind = "rows",
    ) -> None:
        prefix = f"{self.names[id(module)]}."
        weight = self.state[f"{prefix}weight"]
        bias = self.state.get(f"{prefix}bias")
        if columns is not None:
            changed[f"{prefix}weight"] = weight * _along(module, columns, inputs=True)
        if divisor is None:
            return
        if kind == "rows":
            changed[f"{prefix}weight"] = weight / _along(module, divisor, inputs=False)
        else:
            one = 1.0 if kind == "one_plus_gain" else 0.0
            changed[f"{prefix}weight"] = (weight + one) / divisor - one
        if bias is not None:
            changed[f"{prefix}bias"] = bias / divisor

    def _run(self, changed: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            state = {**self.state, **changed}
            return self.call.on(
                lambda *args, **kwargs: functional_call(self.block, state, args, kwargs)
            )


def _along(module: nn.Module, scale: torch.Tensor, *, inputs: bool) -> torch.Tensor:
    """`scale` shaped to multiply the module's weight: `[N, K]`, or transposed in a Conv1D."""
    last = inputs == (type(module) is nn.Linear)
    return scale if last else scale.unsqueeze(1)


def _float(value: Any) -> Any:
    """`value` with every floating-point tensor in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_float(one) for one in value)
    if isinstance(value, dict):
        return {key: _float(one) for key, one in value.items()}
    return value
