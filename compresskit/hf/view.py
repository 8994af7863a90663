"""A view of a model with fewer blocks: the same weights, other depth, nothing copied.

    model   embed ─► 0 ─► 1 ─► 2 ─► 3 ─► norm ─► head
    view    embed ─► 0 ─────────────► 3 ─► norm ─► head      blocks renumbered: a cache of two layers

Modules on the way to the blocks are copied shallowly, so that the view has a list of blocks and a
config of its own; inside a block only what knows its number is copied. All parameters are the
model's own tensors, quantised and prepacked layers included.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from compresskit.errors import Conflict
from compresskit.hf import blocks

if TYPE_CHECKING:
    from collections.abc import Sequence


def keeping(model: Any, kept: Sequence[int]) -> Any:
    """Return a view of `model` that runs only the blocks `kept` (rising).

    Raises:
        Conflict: there are no such blocks, or the model is spread over several devices.
    """
    found = blocks.find(model)
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(found):
        raise Conflict(
            f"the model has blocks 0 to {len(found) - 1}; a view keeps some of them in rising order, "
            f"not {list(kept)}."
        )
    path = found[0].name.split(".")[:-1]
    config = _shorter(model.config, kept)
    view = at = _copy(model, config)
    for name in path[:-1]:
        inner = _copy(getattr(at, name), config)
        at._modules[name] = inner
        at = inner
    list_of_blocks = nn.ModuleList(
        _renumbered(found[index].module, place) for place, index in enumerate(kept)
    )
    at._modules[path[-1]] = list_of_blocks.train(model.training)
    return view


def _copy(module: nn.Module, config: Any) -> Any:
    """A module with the same children, whose list of children and config are its own."""
    twin: Any = copy.copy(module)
    twin._modules = dict(module._modules)
    if hasattr(module, "config"):
        twin.config = config
        # transformers hooks blocks the first time that hidden states are asked for. Most of what it
        # would hook here is the model's own, which would then be hooked twice.
        twin._output_capturing_hooks_installed = True
    # A placement hook binds `forward` to the module that it was made for: the view would run that one.
    twin.__dict__.pop("forward", None)
    return twin


def _shorter(config: Any, kept: Sequence[int]) -> Any:
    """A copy of the config that describes the kept blocks."""
    shorter = copy.deepcopy(config)
    kinds = getattr(config, "layer_types", None)
    shorter.num_hidden_layers = len(kept)
    if kinds is not None:
        shorter.layer_types = [kinds[index] for index in kept]
    return shorter


def _renumbered(module: nn.Module, index: int) -> nn.Module:
    """Return `module` as block `index`: what keeps the block's number is copied, the rest shared."""
    children = {
        name: _renumbered(child, index)
        for name, child in module._modules.items()
        if child is not None
    }
    changed = {
        name: child for name, child in children.items() if child is not module._modules[name]
    }
    if not changed and not hasattr(module, "layer_idx"):
        return module
    twin = copy.copy(module)
    twin._modules = {**module._modules, **changed}
    if hasattr(module, "layer_idx"):
        vars(twin)["layer_idx"] = index
    return twin
