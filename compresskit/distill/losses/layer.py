"""A head in a chunked loss: logits of some hidden states, and what a gradient of those leads back to.

    Plain   a bare linear layer: both products are written out, and the head's gradient is added up in
            its own memory; what autograd would return for each chunk is as large as the head
    Whole   anything else (a head that rounds its weights, a placed one): autograd, chunk by chunk

Gradients are added up in float32 at least, whatever the products are computed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from compresskit.hf.head import Head

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Loss = Callable[[torch.Tensor], torch.Tensor]
    """Logits `[n, V]` to one number."""


class Gradients:
    """What a chunked loss adds up: the gradient of the hidden states and of each parameter."""

    def __init__(self, hidden: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
        """Begin with zero for `hidden` `[N, E]` and each of the head's `parameters`."""
        self.parameters = parameters
        self.hidden = torch.zeros_like(hidden)
        self.of = [torch.zeros_like(one, dtype=wide(one)) for one in parameters]

    def finished(self) -> list[torch.Tensor]:
        """All of them, the hidden states' first, each in the type of what it belongs to."""
        pairs = zip(self.of, self.parameters, strict=True)
        return [self.hidden, *(sum_.to(parameter.dtype) for sum_, parameter in pairs)]


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The type that sums of such numbers are kept in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Plain:
    """A linear layer with or without bias, and a scale or cap behind it."""

    def __init__(self, head: Head, dtype: torch.dtype | None) -> None:
        """Compute products in `dtype`; None is the type of the weights."""
        layer = head.linear
        self.shape = head.shape
        self.weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        self.bias: torch.Tensor | None = layer.bias  # type: ignore[assignment]
        # Once for all chunks; autocast would convert the whole head for every one.
        dtype = dtype or self.weight.dtype
        self._weight = self.weight.detach().to(dtype)
        self._bias = None if self.bias is None else self.bias.detach().to(dtype)

    def vocabulary(self, rows: torch.Tensor) -> int:
        """Logits of a place; `rows` are any hidden states, at least one."""
        return self._weight.shape[0]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, V]` of hidden states `[n, E]`, without gradient."""
        return self.shape(self._raw(rows))

    def slide(self, rows: torch.Tensor, loss: Loss, here: slice, into: Gradients) -> None:
        """Add the gradient of `loss` at `rows`, which are places `here` of all hidden states."""
        raw = self._raw(rows)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss(self.shape(raw.requires_grad_())), raw)
        raw = raw.detach()
        with _no_autocast(rows):
            into.hidden[here] = slope @ self._weight
            for parameter, gradient in zip(into.parameters, into.of, strict=True):
                if parameter is self.bias:
                    gradient += slope.sum(0, dtype=gradient.dtype)
                elif slope.dtype == gradient.dtype:
                    gradient.addmm_(slope.t(), rows.to(slope.dtype))
                else:
                    gradient += slope.t() @ rows.to(slope.dtype)

    def _raw(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), _no_autocast(rows):
            return functional.linear(rows.to(self._weight.dtype), self._weight, self._bias)


class Whole:
    """Any module that turns hidden states into logits."""

    def __init__(self, head: nn.Module) -> None:
        """Take `head` as it is."""
        self._head = head

    def vocabulary(self, rows: torch.Tensor) -> int:
        """Logits of a place, which only shows when there is one."""
        return self.logits(rows[:1]).shape[1]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, V]` of hidden states `[n, E]`, without gradient."""
        with torch.no_grad():
            logits: torch.Tensor = self._head(rows)
        return logits

    def slide(self, rows: torch.Tensor, loss: Loss, here: slice, into: Gradients) -> None:
        """Add the gradient of `loss` at `rows`, which are places `here` of all hidden states."""
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            found = torch.autograd.grad(
                loss(self._head(leaf)), (leaf, *into.parameters), materialize_grads=True
            )
        into.hidden[here] = found[0]
        for gradient, one in zip(into.of, found[1:], strict=True):
            gradient += one


def layer_of(head: nn.Module, rows: torch.Tensor) -> Plain | Whole:
    """The leaner of both that suits `head`; under autocast, products are in autocast's type."""
    if not isinstance(head, Head) or not _bare(head.linear):
        return Whole(head)
    kind = rows.device.type
    return Plain(head, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)


def _bare(layer: nn.Module) -> bool:
    """A linear layer that nobody has hung anything on."""
    hung = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not hung


def _no_autocast(rows: torch.Tensor) -> torch.autocast:
    return torch.autocast(rows.device.type, enabled=False)
