"""How far a changed model is from itself: KL of next-token predictions on some text.

    text ──► dense logits, kept          once per batch
         └─► logits after a change ──► mean KL(dense || changed) per token

A change in block i leaves everything before it alone, so blocks before it are skipped: they hand on
the output they had in the dense pass. Whether that is right for this model is tried once, with
every block skipped; if the logits are not the very same, nothing is skipped.

What is kept stays below `LARGEST_HELD` bytes of logits; longer texts go batch by batch.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compresskit.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.system import System

LARGEST_HELD = 256 << 20
"""Bytes of dense logits kept at a time."""
_ROOM = 16 << 20
"""Bytes of one float32 copy of logits; a handful are alive at a time."""


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[B, S, V]` of tokens (int64 `[B, S]`), without a cache."""
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def mean_kl(dense: torch.Tensor, changed: torch.Tensor) -> float:
    """Mean over tokens of KL(dense || changed) in nats, of logits `[B, S, V]`.

    Raises:
        RunError: a logit is NaN or infinite.
    """
    ours, theirs = dense.flatten(0, 1), changed.flatten(0, 1)
    step = max(1, _ROOM // (4 * ours.shape[1]))
    total = 0.0
    for at in range(0, ours.shape[0], step):
        p = ours[at : at + step].float().log_softmax(-1)
        q = theirs[at : at + step].float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    mean = total / max(1, ours.shape[0])
    if mean != mean or mean in (float("inf"), float("-inf")):
        raise RunError(
            "the model gives NaN or infinite logits, so sensitivities cannot be measured. "
            "Try dtype 'float32'."
        )
    return mean


def batches(system: System, rows: torch.Tensor) -> list[torch.Tensor]:
    """Split `rows` (int64 `[B, S]`) so that the logits of each piece fit into `LARGEST_HELD`."""
    model = system.model
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    size = rows.shape[1] * vocabulary * model.dtype.itemsize
    return list(torch.split(rows.to(system.device.torch), max(1, LARGEST_HELD // size)))


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Compute in float32 for the duration; the original tensors come back, bit for bit.

    In 16 bits any change at all flips roundings all over the model, which costs about 0.002 nats
    on a small one: more than rounding a part to 6 or 8 bits does. Four bytes a parameter are held
    beside the original while it lasts.
    """
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype.itemsize < 4]
    try:
        for tensor, data in narrow:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


class Dense:
    """One batch with the predictions and the block outputs of the unchanged model."""

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        """Run the dense pass."""
        self.model = model
        self.tokens = tokens
        self.blocks = blocks(model)
        self.outputs: list[Any] = []
        hooks = [block.register_forward_hook(self._keep) for block in self.blocks]
        try:
            self.logits = logits_of(model, tokens)
        finally:
            for hook in hooks:
                hook.remove()
        if len(self.outputs) != len(self.blocks) or not self._skipping_is_exact():
            self.blocks, self.outputs = [], []

    def _keep(self, module: nn.Module, given: Any, output: Any) -> None:
        self.outputs.append(output)

    def _skipping_is_exact(self) -> bool:
        with self._resumed(len(self.blocks)):
            return torch.equal(logits_of(self.model, self.tokens), self.logits)

    def kl(self, first: int = 0) -> float:
        """Divergence of the model as it is now, changed in block `first` or after it only."""
        with self._resumed(first if self.blocks else 0):
            return mean_kl(self.logits, logits_of(self.model, self.tokens))

    @contextmanager
    def _resumed(self, first: int) -> Iterator[None]:
        """Let the blocks before `first` hand on what they gave in the dense pass."""
        skipped = self.blocks[:first]
        try:
            for block, output in zip(skipped, self.outputs, strict=False):
                block.forward = lambda *args, given=output, **kwargs: given
            yield
        finally:
            for block in skipped:
                vars(block).pop("forward", None)


def blocks(model: Any) -> list[nn.Module]:
    """The decoder blocks in order, or nothing where they cannot be told."""
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    for _, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def block_of(model: Any, module: nn.Module) -> int:
    """Index of the block that `module` is in; all of them for what comes after the last."""
    found = blocks(model)
    for index, block in enumerate(found):
        if any(inner is module for inner in block.modules()):
            return index
    return len(found) if module is model.get_output_embeddings() else 0
