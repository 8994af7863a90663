"""The fair dense baseline on a CPU: bfloat16 weights laid out once for oneDNN.

`torch.nn.functional.linear` hands oneDNN the weight as it lies and pays for a reorder in every
call. Reordering once gives bit-equal results (for contiguous inputs, at any number of rows) and
decodes about twice as fast on small models, so a compressed model that only beats the plain one
has beaten the reorder, not the dense arithmetic.

The operators are private to torch, so they are tried before anything is replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from compresskit.errors import Conflict
from compresskit.hf import modules

if TYPE_CHECKING:
    from collections.abc import Callable


class PrepackedLinear(nn.Module):
    """A bfloat16 linear layer whose weight oneDNN has laid out; inference only.

    The weight is an opaque tensor of oneDNN: it has no storage that torch could count, so
    `held_bytes` asks oneDNN. Tensors are plain attributes, not buffers: an attribute of a module
    is found at once, a buffer after two failed look-ups, and this runs in every layer of every
    step. They are not in the state dict, since the layout follows the instruction set.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Lay out `weight` (bfloat16 `[N, K]`); the caller drops the original."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self.bias = bias
        self._linear: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the transposed weight plus the bias; x bfloat16 `[..., K]`."""
        return self._linear(x, self.packed, self.bias, "none", [], "")

    def held_bytes(self) -> dict[str, int]:
        """Bytes of the laid-out weight, oneDNN's padding included, and of the bias."""
        held = {"packed": opaque_bytes(self.packed)}
        return held if self.bias is None else {**held, "bias": self.bias.nbytes}

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors behind `held_bytes`."""
        return [self.packed] if self.bias is None else [self.packed, self.bias]

    def extra_repr(self) -> str:
        """Shape, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def prepack(model: nn.Module) -> list[str]:
    """Replace every dense linear layer of `model` in place; return their names.

    A head that is tied to the embedding gets a laid-out copy and the embedding stays. Raises
    `Conflict` before touching anything if the model or the machine cannot do it.
    """
    sites = modules.linears(model)
    for site in sites:
        weight = site.weight()
        if weight.device.type != "cpu":
            raise Conflict(f"Mode 'prepacked' needs a CPU; {site.name} is on {weight.device}.")
        if weight.dtype != torch.bfloat16:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise Conflict(
                f"Mode 'prepacked' needs bfloat16 weights; {site.name} is {dtype}. "
                "Use dtype 'bfloat16' or mode 'eager'."
            )
    if sites:
        _try_operators()
    names = [site.name for site in sites]
    modules.replace_each(sites, lambda site: PrepackedLinear(site.weight(), site.bias()))
    modules.leave_checkpoint(model)
    return names


def _try_operators() -> None:
    """Raise `Conflict` unless oneDNN lays out a small weight and multiplies it right."""
    reason = "this torch has no mkldnn operators for it"
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        weight = torch.arange(-16, 16, dtype=torch.bfloat16).reshape(4, 8)
        try:
            got = PrepackedLinear(weight, None)(weight)
        except RuntimeError as error:  # what oneDNN raises on a CPU without AVX-512
            reason = str(error).splitlines()[0]
        else:
            if torch.equal(got, functional.linear(weight, weight)):
                return
            reason = "its result differs from torch.nn.functional.linear"
    raise Conflict(f"Mode 'prepacked' cannot run here: {reason}. Use mode 'eager'.")


def opaque_bytes(packed: torch.Tensor) -> int:
    """Bytes of a weight that oneDNN has laid out, its padding included."""
    count = getattr(torch.ops.mkldnn, "_nbytes", None)
    return int(count(packed)) if count is not None else packed.numel() * packed.element_size()
