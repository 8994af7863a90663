"""Where the feed-forward layer and the attention of each block hang, and how wide they are.

Layers are known by the names that transformers gives them. A block that names them otherwise, or
fuses what would have to be cut, is refused by name rather than guessed at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.pytorch_utils import Conv1D

from compresskit.errors import SpecError
from compresskit.hf import blocks

if TYPE_CHECKING:
    from torch import nn


class FeedForward(NamedTuple):
    """The feed-forward layer of one block; paths from the model."""

    into: tuple[str, ...]
    """Layers that read the hidden state: gate and up, or one."""
    out: str
    """The layer that writes to it."""
    size: int
    """Neurons."""
    transposed: bool
    """Weights lie as `[in, out]`, GPT-2's way."""


class Attention(NamedTuple):
    """The attention of one block; paths from the model."""

    q: str
    k: str
    v: str
    o: str
    groups: int
    """Key/value heads."""
    queries: int
    """Query heads of each."""
    width: int
    """Numbers in a head."""
    norms: tuple[str, str] | None
    """Norms of queries and keys that have a gain for each number of each head."""


_FFNS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("c_fc",), "c_proj"),
)
"""Names of the layers into and out of the neurons."""


def feed_forwards(model: Any) -> list[FeedForward]:
    """One for each block.

    Raises:
        SpecError: a block has none that can be cut, or they differ in size.
    """
    all_blocks = blocks.find(model)
    found = [one for block in all_blocks if (one := _feed_forward(block)) is not None]
    if len(found) < len(all_blocks) or len({one.size for one in found}) > 1:
        raise SpecError(
            f"width: the feed-forward layers of {model.config.model_type} have no neurons that can be "
            "told apart by name, or differ in size. Use layers or scratch."
        )
    return found


def _feed_forward(block: blocks.Block) -> FeedForward | None:
    for path, module in block.module.named_modules():
        for into, out in _FFNS:
            layers = [getattr(module, name, None) for name in (*into, out)]
            if any(getattr(getattr(x, "weight", None), "ndim", 0) != 2 for x in layers):
                continue
            last: Any = layers[-1]
            transposed = type(last) is Conv1D
            at = f"{block.name}.{path}"
            return FeedForward(
                tuple(f"{at}.{name}" for name in into),
                f"{at}.{out}",
                last.weight.shape[0 if transposed else 1],
                transposed,
            )
    return None


def attentions(model: Any) -> list[Attention]:
    """One for each block.

    Raises:
        SpecError: queries, keys and values are fused, or the width of a head follows from their number.
    """
    config = model.config
    all_blocks = blocks.find(model)
    found = [one for block in all_blocks if (one := _attention(block, config)) is not None]
    if not hasattr(config, "head_dim") or len(found) < len(all_blocks):
        raise SpecError(
            f"width: heads of {config.model_type} cannot be cut: its queries, keys and values are one "
            "matrix, or their width follows from the number of heads. Use ffn=, layers or scratch."
        )
    return found


def _attention(block: blocks.Block, config: Any) -> Attention | None:
    for path, module in block.module.named_modules():
        layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        if any(getattr(getattr(x, "weight", None), "ndim", 0) != 2 for x in layers):
            continue
        qs, ks, vs, os = (tuple(layer.weight.shape) for layer in layers if layer is not None)
        groups = config.num_key_value_heads
        width = ks[0] // groups
        heads = qs[0] // width
        whole = ks[0] == vs[0] == groups * width and qs[0] == heads * width == os[1]
        if not whole or heads != config.num_attention_heads or heads % groups:
            return None
        at = f"{block.name}.{path}"
        return Attention(
            q=f"{at}.q_proj",
            k=f"{at}.k_proj",
            v=f"{at}.v_proj",
            o=f"{at}.o_proj",
            groups=groups,
            queries=heads // groups,
            width=width,
            norms=_norms(module, at, heads, groups, width),
        )
    return None


def _norms(
    module: nn.Module, at: str, heads: int, groups: int, width: int
) -> tuple[str, str] | None:
    """Norms that run over all heads at once; those over one head stay as they are."""
    gains = [getattr(getattr(module, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    sizes = [None if gain is None else gain.numel() for gain in gains]
    if sizes == [heads * width, groups * width] and heads > 1:
        return f"{at}.q_norm", f"{at}.k_norm"
    return None
