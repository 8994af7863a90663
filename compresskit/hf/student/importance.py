"""How much each neuron and each group of heads adds to the hidden state.

    neuron i    mean over tokens of |a_i| * ||W_out[:, i]||       a: what the output matrix reads
    group g     mean over tokens of ||W_o[:, g] x_g||             x_g: outputs of the heads of g

Both are the mean length of the vector that arrives at the hidden state; neurons and heads that are
loud, but that the output matrix ignores, count for nothing.

On the shipped tiny model, with a quarter of its neurons left and no training, weighing activations by
the output matrix gave 3.54 nats a token on held-out text, plain mean activations 3.65, random neurons
9.1 to 10.1 (six seeds); with half or three quarters of them left the first two came out equal. On
SmolLM2-135M (2.55), two thirds of the heads: 3.08 where they were chosen so, 3.86 to 4.77 at random.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from compresskit.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from compresskit.hf.student.parts import Attention, FeedForward


@dataclass(frozen=True)
class Importance:
    """Scores of every block, float64."""

    neurons: list[torch.Tensor]
    """`[F]` for each block."""
    groups: list[torch.Tensor]
    """`[K]` for each block."""
    kept: dict[str, Any]
    """Share of the summed importance that was chosen so far, by kind, block after block."""

    def best(self, what: Literal["neurons", "groups"], place: int, count: int) -> torch.Tensor:
        """int64 `[count]`, rising: the most important ones of block `place`."""
        scores = (self.neurons if what == "neurons" else self.groups)[place]
        order = scores.argsort(descending=True, stable=True)[:count].sort().values
        share = (scores[order].sum() / scores.sum()).item() if scores.sum() > 0 else 1.0
        self.kept.setdefault(what, []).append(share)
        return order


@torch.no_grad()
def importance(
    model: Any,
    rows: Sequence[torch.Tensor],
    ffns: Sequence[FeedForward],
    heads: Sequence[Attention],
) -> Importance:
    """Run `rows` (int64 `[B, T]` each) through `model` and score what is named."""
    neurons = [_Sum() for _ in ffns]
    groups = [_Sum() for _ in heads]
    with ExitStack() as hooks:
        for total, ffn in zip(neurons, ffns, strict=True):
            out = model.get_submodule(ffn.out)
            columns = _norms_of_columns(out, transposed=ffn.transposed)
            _listen(hooks, out, lambda x, s=total, c=columns: s.add(x.double().abs() * c))
        for total, one in zip(groups, heads, strict=True):
            out = model.get_submodule(one.o)
            _listen(hooks, out, lambda x, s=total, o=out, a=one: s.add(_arriving(x, o.weight, a)))
        for batch in rows:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return Importance([s.mean() for s in neurons], [s.mean() for s in groups], {})


class _Sum:
    """Mean over tokens of what is added batch by batch."""

    def __init__(self) -> None:
        """Nothing was added yet."""
        self.total: torch.Tensor | None = None
        self.tokens = 0

    def add(self, values: torch.Tensor) -> None:
        """values: `[B, T, n]`."""
        flat = values.flatten(0, -2)
        summed = flat.sum(0).cpu()
        self.total = summed if self.total is None else self.total + summed
        self.tokens += flat.shape[0]

    def mean(self) -> torch.Tensor:
        """float64 `[n]`.

        Raises:
            Conflict: the layer was never called.
        """
        if self.total is None:
            raise Conflict(
                "a layer that was to be cut did nothing when the teacher read the text, so nothing is known "
                "of its parts. Use layers or scratch."
            )
        return self.total / self.tokens


def _listen(hooks: ExitStack, module: nn.Module, heard: Any) -> None:
    """Call `heard` with what `module` is given, until the hooks are closed."""
    handle = module.register_forward_pre_hook(lambda _, args: heard(args[0]))
    hooks.callback(handle.remove)


def _norms_of_columns(out: Any, *, transposed: bool) -> torch.Tensor:
    """`[F]`: length of what one unit of each neuron adds to the hidden state."""
    weight = out.weight.detach().double()
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1 if transposed else 0)
    return norms


def _arriving(x: torch.Tensor, weight: torch.Tensor, one: Attention) -> torch.Tensor:
    """`[B, T, K]`: length of what each group adds; x is `[B, T, H*D]`, weight `[E, H*D]`."""
    size = one.queries * one.width
    pairs = zip(
        torch.split(x.float(), size, dim=-1), torch.split(weight.float(), size, dim=1), strict=True
    )
    lengths = [torch.linalg.vector_norm(part @ columns.t(), dim=-1) for part, columns in pairs]
    return torch.stack(lengths, dim=-1).double()
