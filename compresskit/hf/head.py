"""A causal language model in two parts: what ends in hidden states, and what makes logits of them.

    tokens [B, L] ─► base ─► hidden [B, L, E] ─► head ─► logits [B, L, V]

Whoever keeps the hidden states can have the logits a few places at a time, and so never holds them
all. The head is the model's output layer and what some models do behind it: Gemma 2 caps logits by a
tanh, Granite divides them, Cohere multiplies them. Nothing of that is taken on trust. A short probe
compares the parts with the model, with the output layer's result blown up, so that a cap that small
logits would not reach shows too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from compresskit.errors import Conflict
from compresskit.hf import modules

if TYPE_CHECKING:
    from collections.abc import Iterator

PROBE = 8
"""Tokens of the probe."""
LOUD = 100.0
"""Largest logit of the probe; caps in use are at 15 to 50."""
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Names in configs of a number that logits are multiplied by (Cohere, Falcon-H1)."""
DIVISORS = ("logits_scaling",)
"""Names of one that they are divided by (Granite)."""
CAPS = ("final_logit_softcapping",)
"""Names of the largest logit (Gemma 2)."""


@dataclass(frozen=True)
class Shape:
    """What happens behind the output layer: `cap * tanh(scale * logits / cap)`."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap `logits`, of any shape."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


class Head(nn.Module):
    """Turns hidden states `[..., E]` into the model's logits `[..., V]`."""

    def __init__(self, linear: nn.Module, shape: Shape) -> None:
        """Put `shape` behind the model's own output layer, which is shared, not copied."""
        super().__init__()
        self.linear = linear
        self.shape = shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` of `hidden` `[..., E]`."""
        logits: torch.Tensor = self.shape(self.linear(hidden))
        return logits


class Parts(NamedTuple):
    """A model, taken apart; the weights are the model's own."""

    base: Any
    """Called with `input_ids=`, returns an object with `last_hidden_state` `[B, L, E]`."""
    head: Head


def split(model: Any) -> Parts:
    """Take a causal language model apart.

    Raises:
        Conflict: the model has no output layer of its own, or does something between its last hidden
            state and its logits that is not known here.
    """
    return Parts(model.base_model, Head(_output_layer(model), shape(model)))


def shape(model: Any) -> Shape:
    """What `model` does behind its output layer, as a probe of `PROBE` tokens confirms.

    Raises:
        Conflict: as in `split`.
    """
    linear = _output_layer(model)
    heard, logits, hidden = _probe(model, linear)
    if heard is not None and _same(heard.input, hidden):
        for candidate in _candidates(model):
            if _same(candidate(heard.output), logits):
                return candidate
    raise Conflict(
        f"{type(model).__name__} does more between its last hidden state and its logits than its "
        "output layer, a known scale and a known soft cap, so its logits cannot be made a few places "
        "at a time. Use a model whose logits are head(hidden states)."
    )


def _output_layer(model: Any) -> nn.Module:
    linear = modules.head(model)
    if linear is None or model.base_model is model:
        raise Conflict(
            f"{type(model).__name__} has no output layer apart from its base model. Load it as a "
            "causal language model."
        )
    return linear


def _candidates(model: Any) -> Iterator[Shape]:
    """Shapes that the config allows for; plain only where it names neither scale nor cap."""
    config = model.config.get_text_config()
    scales = [1 / value for name in DIVISORS if (value := getattr(config, name, None))]
    scales += [value for name in MULTIPLIERS if (value := getattr(config, name, None))]
    caps = [value for name in CAPS if (value := getattr(config, name, None))]
    for scale in scales or [1.0]:
        for cap in caps or [None]:
            yield Shape(float(scale), cap)


class _Heard(NamedTuple):
    """What the output layer was given in the probe, and what it was made to answer."""

    input: torch.Tensor
    output: torch.Tensor


@torch.no_grad()
def _probe(model: Any, linear: nn.Module) -> tuple[_Heard | None, torch.Tensor, torch.Tensor]:
    """Run a few tokens through model and base; leave the model's training mode as it was."""
    heard: list[_Heard] = []

    def blow_up(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        loud = output * (LOUD / output.abs().amax().clamp(min=1e-6))
        heard.append(_Heard(args[0], loud))
        return loud

    vocabulary = model.config.get_text_config().vocab_size
    tokens = (torch.arange(PROBE, device=model.device)[None] + 3) % vocabulary  # 0 is often padding
    training = [module for module in model.modules() if module.training]
    model.eval()
    handle = linear.register_forward_hook(blow_up)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        handle.remove()
        for module in training:
            module.training = True
    return (heard[0] if len(heard) == 1 else None), logits, hidden


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal up to a few roundings of the narrower type, by the largest element."""
    if ours.shape != theirs.shape:
        return False
    narrow = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)
    gap = (ours.double() - theirs.double()).abs().amax()
    return bool(gap <= 8 * narrow * theirs.double().abs().amax())
