"""Find the linear layers of a transformers decoder, replace them, and say what is left dense.

A linear layer is an `nn.Linear` or GPT-2's `Conv1D` (the same thing with the weight transposed).
Subclasses are left alone: they are somebody's own quantised, adapted or routed layer. Experts that
are kept as one 3-D parameter are no modules each; `experts` finds what holds them, and what a method
leaves of them is counted by `left_dense`.

Output heads: where the head shares the embedding's weight, replacing the head gives it a copy of
its own and the embedding stays dense for the look-up. Both are then held, and both are counted.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import nn
from transformers.pytorch_utils import Conv1D

from compresskit.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch


RELEASE_BYTES = 1 << 26
"""Dense bytes replaced between two releases of freed memory."""


@runtime_checkable
class HoldsBytes(Protocol):
    """A module that accounts for its own tensors, which torch would not find or would miscount."""

    def held_bytes(self) -> dict[str, int]:
        """Bytes in memory by role, everything included (bias, scales, padding)."""


class Site(NamedTuple):
    """A linear layer and where it hangs."""

    name: str
    """Dotted path from the model."""
    module: nn.Module
    parent: nn.Module
    attribute: str

    def weight(self) -> torch.Tensor:
        """The weight as `[N, K]`, without gradient; a view."""
        weight: torch.Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight.t() if type(self.module) is Conv1D else weight

    def bias(self) -> torch.Tensor | None:
        """The bias `[N]`, without gradient, or None."""
        bias: Any = self.module.bias
        return None if bias is None else bias.detach()

    def replace(self, module: nn.Module) -> None:
        """Put `module` in place of this layer."""
        setattr(self.parent, self.attribute, module)


def linears(model: nn.Module) -> list[Site]:
    """Every linear layer in the order of the model, the output head included."""
    return list(_linears(model))


def _linears(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear or type(module) is Conv1D:
            path, _, attribute = name.rpartition(".")
            yield Site(name, module, model.get_submodule(path), attribute)


def embedding(model: Any) -> Site:
    """The input embedding.

    Raises:
        Conflict: the model has none that could be replaced.
    """
    module = model.get_input_embeddings()
    for name, found in model.named_modules():
        if found is module and isinstance(found, nn.Embedding):
            path, _, attribute = name.rpartition(".")
            return Site(name, found, model.get_submodule(path), attribute)
    raise Conflict("The model has no input embedding that could be quantised.")


def experts(model: nn.Module) -> list[Site]:
    """Modules that keep routed experts as 3-D parameters in transformers' common form.

    Those with a norm after each expert are left out: nothing here knows how to apply it.
    """
    found = []
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        common = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
        plain = not getattr(module, "has_post_expert_norm", False)
        if common and plain and isinstance(down, nn.Parameter) and down.dim() == 3:
            path, _, attribute = name.rpartition(".")
            found.append(Site(name, module, model.get_submodule(path), attribute))
    return found


def head(model: Any) -> nn.Module | None:
    """The layer that turns hidden states into logits, if the model has one."""
    found = model.get_output_embeddings()
    return found if isinstance(found, nn.Module) else None


def is_tied(model: Any) -> bool:
    """Whether the head shares the weight of the embedding."""
    top, embedding = head(model), model.get_input_embeddings()
    shared = getattr(top, "weight", None)
    return shared is not None and shared is getattr(embedding, "weight", None)


def replace_each(sites: list[Site], make: Callable[[Site], nn.Module]) -> None:
    """Replace the layers of `sites` one by one, dropping each before the next is made.

    Empties `sites`, which holds references to the dense layers. Freed memory goes back to the
    system every `RELEASE_BYTES`, since doing so after every layer would cost more than quantising.
    """
    freed = 0
    for _ in range(len(sites)):
        site = sites.pop(0)
        freed += site.weight().nbytes
        site.replace(make(site))
        del site
        if freed > RELEASE_BYTES or not sites:
            release_freed()
            freed = 0


def release_freed() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Packed weights are allocated between temporaries of their own size; what the temporaries leave
    is free, but glibc keeps it. Measured on a 135M model: 1480 MB resident after quantising to
    int8 without this, 580 with it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def leave_checkpoint(model: nn.Module) -> None:
    """Copy what is still dense out of the mapped checkpoint, so that the file need not be resident.

    Weights are loaded as views of the mapped file; one small norm keeps all of its pages mapped.
    Call it after packing, when most of the file serves nobody. Measured on a 135M model quantised to
    int8: 212 MB less resident.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, shared ones once; a packed layer counts as the dense one it stands for."""
    packed = _packed(model)
    inside = {id(p) for module in packed for p in module.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return dense + sum(stands_for(module) for module in packed)


def stands_for(module: Any) -> int:
    """Parameters of the dense layer that a packed one replaces."""
    if hasattr(module, "embedding_dim"):
        return 0 if module.shared else int(module.num_embeddings * module.embedding_dim)
    if not hasattr(module, "in_features"):
        return sum(parameter.numel() for parameter in module.parameters())
    bias = getattr(module, "bias", None)
    return int(module.in_features * module.out_features) + (0 if bias is None else bias.numel())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as held: parameters (shared ones once), and packed layers' own count."""
    packed = sum(sum(module.held_bytes().values()) for module in _packed(model))
    return packed + sum(left_dense(model).values())


def left_dense(model: nn.Module) -> dict[str, int]:
    """Bytes of the parameters that are still dense, by kind, shared ones once; largest first."""
    inside = {id(p) for module in _packed(model) for p in module.parameters()}
    top = head(model)
    sizes: dict[str, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in inside:
                inside.add(id(parameter))
                kind = "head" if module is top else kind_of(module, parameter)
                sizes[kind] = sizes.get(kind, 0) + parameter.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _packed(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, HoldsBytes)]


def kind_of(module: nn.Module, parameter: nn.Parameter) -> str:
    """What a dense parameter is for, from the shape and the class of its owner."""
    name = type(module).__name__
    if parameter.dim() == 3:
        return "experts"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    if "Norm" in name:
        return "norm"
    return "router" if "Router" in name or "Gate" in name else "other"
