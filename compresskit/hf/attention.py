"""The attention function of our CPU runs: transformers' own, but for single tokens.

Decoding attends with one token at a time, for which torch's CPU attention takes most of a small
model's step. The function registered here answers that case with `decode_attention` and hands all
others (prompts, masks, verification of drafts) to transformers' `sdpa`. Every row of a comparison
uses it, dense ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit_kernels.decode_attention import native
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

if TYPE_CHECKING:
    import torch

    from compresskit.device import Device

NAME = "compresskit_decode"


def use_decode_attention(model: Any, device: Device) -> None:
    """Let `model` attend with our function, if it would use `sdpa` on a CPU that has ours."""
    if device.kind == "cpu" and model.config._attn_implementation == "sdpa" and native.runs():
        model.set_attn_implementation(NAME)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    plain = attention_mask is None and not rest.get("position_bias") and not rest.get("cache")
    if plain and native.supports(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return native.attend(query, key, value, scale), None
    answer: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **rest,
    )
    return answer


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
