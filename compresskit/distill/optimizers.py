"""What moves the weights: AdamW, or Muon for attention with AdamW for everything else.

Each group of parameters carries `part`, its learning rate as a part of the recipe's. All of a
training's optimizers step together.

Papers: Loshchilov and Hutter 2019, AdamW, arXiv 1711.05101; Liu et al. 2025, Muon is Scalable for LLM
Training, arXiv 2502.16982 (Muon with decay, its steps as long as AdamW's).
Differs: Muon moves the matrices of attention alone. In trials on the shipped tiny models that is where
it helped: heads that find a name and then the place beside it came in far fewer steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from compresskit.distill.recipe import Recipe

_ITERATIONS = 4
"""Newton-Schulz iterations of Muon, as for the shipped tiny models; torch's default is 5."""


def build(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Optimizers of everything in `module` that is trained; their rates are set by `set_rate`."""
    named = [(name, item) for name, item in module.named_parameters() if item.requires_grad]
    if recipe.optimizer == "adamw":
        return [_adamw([item for _, item in named], recipe, part=1.0, decay=recipe.weight_decay)]
    heads = [item for name, item in named if item.ndim == 2 and _of_attention(name)]
    taken = {id(item) for item in heads}
    others = [item for _, item in named if id(item) not in taken]
    muon = torch.optim.Muon(
        [{"params": heads, "part": 1.0}],
        lr=0.0,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
        ns_steps=_ITERATIONS,
    )
    return [muon, _adamw(others, recipe, part=recipe.others_rate, decay=0.0)]


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give every group its part of `rate`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["part"]


def _adamw(
    items: Sequence[nn.Parameter], recipe: Recipe, *, part: float, decay: float
) -> torch.optim.Optimizer:
    matrices = [item for item in items if item.ndim >= 2]
    vectors = [item for item in items if item.ndim < 2]
    groups = [
        {"params": matrices, "part": part, "weight_decay": decay},
        {"params": vectors, "part": part, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=recipe.betas, fused=True
    )


def _of_attention(name: str) -> bool:
    """Whether a parameter lies in a block's attention; transformers calls it self_attn, attn or attention."""
    return any(part in ("self_attn", "attn", "attention") for part in name.split("."))
