"""Draw tokens from logits: greedy, or temperature with top-k, top-p and min-p.

`probabilities` is the one definition of the distribution that a loop samples from; speculative
verifiers use the same function, so target and draft can never see different filters.

Order of the filters, as in transformers: temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from compresskit.spec import SamplingSpec


def probabilities(logits: torch.Tensor, sampling: SamplingSpec) -> torch.Tensor:
    """Return float32 probabilities `[..., V]` after temperature and filters; needs temperature > 0.

    top-p: Holtzman et al. 2020, arXiv 1904.09751; min-p: Nguyen et al. 2024, arXiv 2407.01082.
    """
    scores = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        weakest = scores.topk(sampling.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < weakest, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        # A token stays while the mass before it is below p: the one that crosses p is kept.
        drop = (mass - ordered.softmax(-1)) >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), -torch.inf)
    probs = scores.softmax(-1)
    if sampling.min_p > 0:
        weak = probs < sampling.min_p * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(weak, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(
    logits: torch.Tensor, sampling: SamplingSpec, generator: torch.Generator | None
) -> torch.Tensor:
    """Return one token per row: int64 `[B]` from logits `[B, V]`."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator).squeeze(-1)


def generator_for(
    seed: int, device: torch.device, sampling: SamplingSpec
) -> torch.Generator | None:
    """A seeded generator where sampling needs one."""
    return None if sampling.temperature == 0 else torch.Generator(device).manual_seed(seed)
