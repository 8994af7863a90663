"""A model that is in training continues rows of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from compresskit.hf.cache import new_dynamic
from compresskit.hf.step import eager_step
from compresskit.sampling import draw, generator_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from compresskit.spec import SamplingSpec


# Not inference mode: its tensors cannot be used in the training step that follows.
@torch.no_grad()
def continued(
    model: Any, prompts: torch.Tensor, new: int, *, sampling: SamplingSpec, seed: int
) -> torch.Tensor:
    """Return the `new` tokens, int64 `[B, new]`, that follow `prompts` `[B, P]`, through a dense cache.

    Dropout and the like are off meanwhile. The same weights, prompts and seed give the same tokens.
    """
    generator = generator_for(seed, prompts.device, sampling)
    step, cache = eager_step(model), new_dynamic(model.config)
    tokens: list[torch.Tensor] = []
    with evaluating(model):
        read = prompts
        for _ in range(new):
            read = draw(step(read, cache)[:, -1], sampling, generator).unsqueeze(-1)
            tokens.append(read)
    return torch.cat(tokens, dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
