"""The attention function of our runs: a cache layer of ours may answer, single tokens are fast.

    model ──► layer.update(k, v) ──► keys ──► attention function ──► who handed out these keys?
                                                  ├─ a layer of ours: `layer.attend(call)`
                                                  └─ nobody: `call.dense()`

That is all a cache method needs to look at queries (eviction by attention), to read its codes
instead of a full-precision copy (quantised caches) or only some of its rows (retrieval), on every
architecture, in our loop and in plain `model.generate()`: a layer marks the keys that it hands out
(`hf.cache.hand`), so nothing here knows methods, layers or models.

`dense` is transformers' `sdpa`, but for single tokens on a CPU: for them torch's attention takes most
of a small model's step, and `decode_attention` answers. Every row of a comparison uses the same
function, dense ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from compresskit_kernels.decode_attention import native
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from compresskit.errors import Conflict
from compresskit.hf.cache import owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compresskit.device import Device

NAME = "compresskit"


class Call(NamedTuple):
    """One layer's attention over its cache."""

    module: torch.nn.Module
    """The model's attention module."""
    query: torch.Tensor
    """`[B, H, T, D]`, rotated and normalised already."""
    keys: torch.Tensor
    """`[B, K, S, D]`, what the cache layer handed out."""
    values: torch.Tensor
    mask: torch.Tensor | None
    """Bool `[B, 1, T, S]`, or None: every query sees all older tokens. Made once for all layers of a
    kind, so S is that of the first one."""
    scale: float
    rest: Mapping[str, Any]

    def dense(self) -> torch.Tensor:
        """Attend over `keys` and `values`: `[B, T, H, D]`."""
        plain = self.mask is None and not self.rest.get("position_bias")
        if plain and native.supports(self.query, self.keys, self.values):
            return native.attend(self.query, self.keys, self.values, self.scale)
        answer: torch.Tensor
        answer, _ = sdpa_attention_forward(
            self.module,
            self.query,
            self.keys,
            self.values,
            self.mask,
            scaling=self.scale,
            **self.rest,
        )
        return answer

    def over(
        self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Call:
        """The same queries over other rows.

        No `mask` means: every query sees all rows but the newest T, which are causal among
        themselves.
        """
        new, rows = self.query.shape[2], keys.shape[2]
        if mask is None and 1 < new < rows:
            # torch aligns `is_causal` at the upper left, and transformers then drops older rows.
            mask = torch.ones(new, rows, dtype=torch.bool, device=keys.device)
            mask = mask.tril(rows - new)[None, None]
        return self._replace(keys=keys, values=values, mask=mask)


def use(model: Any) -> None:
    """Let `model` attend with our function, for good.

    Raises:
        Conflict: its attention has terms that ours would leave out (sinks, soft caps), or is none
            that could be replaced.
    """
    config = model.config
    if config._attn_implementation == NAME:
        return
    if config._attn_implementation != "sdpa":
        raise Conflict(
            f"{config.model_type} attends with {config._attn_implementation!r}: only 'sdpa' can be "
            "replaced by an attention function that asks the cache. Run it without the cache method."
        )
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        raise Conflict(
            f"{config.model_type} caps its attention scores, which 'sdpa' leaves out. Run it "
            "without the cache method."
        )
    model.set_attn_implementation(NAME)


def use_decode_attention(model: Any, device: Device) -> None:
    """Let `model` attend with our function where that is faster: on a CPU that has `native`."""
    if device.kind == "cpu" and model.config._attn_implementation == "sdpa" and native.runs():
        model.set_attn_implementation(NAME)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(module, query, key, value, attention_mask, scale, rest)
    layer = owner(key)
    return (call.dense() if layer is None else layer.attend(call)), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
