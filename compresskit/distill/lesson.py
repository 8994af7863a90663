"""A student, what it is asked, and how wrong it is: the module that training moves.

    tokens [B, L] ─► student ─► hidden [N, E] ─► terms of the loss, chunk by chunk ─► sums
                        └─► states of blocks ─► projections ─► distance from the teacher's

Everything trainable is inside and takes part in every forward pass, so that the module can be wrapped
for several devices.

A forward pass returns sums, never means. A mean of a mean over batches is wrong as soon as batches
count differently: with 3 places in one and 1 in the other, each place of the first would count a
third. Whoever steps divides: by the weight of all batches, on all devices, that make up the step
(`Batch.label_weights` gives it before any forward pass), so that neither the number of accumulated
batches nor that of devices changes a gradient. DistributedDataParallel averages over devices, which
then has to be undone by a factor. Sums also keep gradients near 1, where float16 has digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from compresskit.distill.losses.chunked import Places, summed
from compresskit.distill.losses.divergence_terms import Divergence
from compresskit.distill.losses.term import CrossEntropy, Hidden
from compresskit.distill.losses.terms import check, kind_of
from compresskit.errors import Conflict
from compresskit.hf import blocks as block_finder, head as heads, modules
from compresskit.hf.states import behind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.distill.batch import Dense, Target
    from compresskit.distill.losses.term import Term


class LessonLoss(NamedTuple):
    """What a batch adds to a step."""

    total: torch.Tensor
    """The loss, summed over places by their weights; with a gradient that can be taken once."""
    weight: torch.Tensor
    """Sum of the weights."""
    parts: dict[str, torch.Tensor]
    """Each term by name, summed likewise, without its own weight and without a gradient; divided by
    `weight` it is in the term's unit per place: nats, or the square of a hidden state's."""


class Lesson(nn.Module):
    """A student with its loss."""

    def __init__(
        self,
        model: Any,
        terms: Sequence[Term],
        *,
        blocks: Sequence[int] = (),
        teacher_width: int | None = None,
        chunk: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        """Take a student's model, which stays the caller's.

        Args:
            model: A causal language model; its trainable parameters are those with a gradient.
            terms: What is summed.
            blocks: For each block of the student the teacher's one that it stands for (`hidden:at=every`).
            teacher_width: Length of the teacher's hidden states (`hidden`).
            chunk: Places whose logits are there at a time; by the size of the vocabulary if left out.
            checkpointing: Compute the activations of blocks twice instead of keeping them.

        Raises:
            Conflict: the model's logits cannot be made a few places at a time, or a hidden term is not
                told what it needs of the teacher; or its activations cannot be computed twice.
        """
        super().__init__()
        self.model = model
        self.terms = tuple(terms)
        self.blocks = tuple(blocks)
        self.chunk = chunk
        self._shape = heads.shape(model)
        self._hidden = next((term for term in terms if isinstance(term, Hidden)), None)
        self._predicted = [one for one in terms if isinstance(one, CrossEntropy | Divergence)]
        self.projections = nn.ModuleList()
        if self._hidden is not None:
            self._project(teacher_width)
        if checkpointing:
            _recompute_activations(model)

    @property
    def needs_states(self) -> tuple[int, ...]:
        """Blocks of the teacher whose hidden states a target has to bring."""
        every = self._hidden is not None and self._hidden.at == "every"
        return tuple(sorted(set(self.blocks))) if every else ()

    def forward(
        self, tokens: torch.Tensor, weights: torch.Tensor, target: Target | None
    ) -> LessonLoss:
        """Sum the loss of a batch.

        Args:
            tokens: int64 `[B, L]`.
            weights: `[B, L]`, of each token as the one to be predicted (`Batch.weights`); places whose
                next token has none are not computed further than their hidden states.
            target: What the teacher says of the `B * (L - 1)` places.

        Raises:
            SpecError: a term cannot be had from such a target.
            Conflict: student and teacher have vocabularies of different sizes.
        """
        check(self.terms, kind_of(target))
        count = len(self.blocks) if self.needs_states else 0
        with behind(self.model, range(count)) as seen:
            # The last token is never asked for a next one, and no other one looks at it.
            output = self.model.base_model(input_ids=tokens[:, :-1], use_cache=False)
        counted = weights[:, 1:].flatten()
        some = counted.nonzero()[:, 0]
        # Plain text counts everywhere, and then nothing has to be copied.
        where = some if len(some) < len(counted) else slice(None)
        places = Places(tokens[:, 1:].flatten(), counted, target).at(where)
        hidden = output.last_hidden_state.flatten(0, 1)[where]
        layer = modules.head(self.model)
        head = heads.Head(layer, self._shape)  # type: ignore[arg-type]  # `shape` has found it
        # Hidden states alone ask nothing of the head; with no place it still takes part.
        asked = slice(None) if self._predicted else slice(0)
        sums = summed(hidden[asked], head, self._predicted, places.at(asked), chunk=self.chunk)
        names = [term.name for term in self._predicted]
        parts = dict(zip(names, sums.parts, strict=True))
        total = sums.total
        if self._hidden is not None:
            states = [seen[index].flatten(0, 1)[where] for index in range(count)] or [hidden]
            distance = self._distance(states, places)
            parts[self._hidden.name] = distance.detach()
            total = total + self._hidden.weight * distance
        return LessonLoss(total, counted.sum(), parts)

    def _project(self, teacher_width: int | None) -> None:
        """Make a projection for each compared state, where the widths differ."""
        every = self._hidden is not None and self._hidden.at == "every"
        count = len(block_finder.find(self.model)) if every else 1
        if teacher_width is None or (every and len(self.blocks) != count):
            raise Conflict(
                "the term hidden compares states with the teacher's, so a lesson needs the teacher's "
                f"width ({teacher_width}) and, for at=every, one of its blocks for each of the "
                f"student's {count} (there are {len(self.blocks)})."
            )
        width: int = self.model.config.get_text_config().hidden_size
        if width != teacher_width:
            where = {"device": self.model.device, "dtype": self.model.dtype}
            self.projections.extend(
                nn.Linear(width, teacher_width, bias=False, **where) for _ in range(count)
            )

    def _distance(self, states: Sequence[torch.Tensor], places: Places) -> torch.Tensor:
        """Mean square of differences, averaged over compared states, summed over places by weight."""
        target = cast("Dense", places.target)
        if absent := set(self.needs_states) - set(target.states):
            raise Conflict(
                f"the term hidden compares with the teacher's blocks {list(self.needs_states)}, and its "
                f"target lacks {sorted(absent)}. Ask the teacher for `needs_states`."
            )
        wanted = (
            [target.states[one] for one in self.blocks] if self.needs_states else [target.hidden]
        )
        sums = []
        for index, (ours, theirs) in enumerate(zip(states, wanted, strict=True)):
            projected = self.projections[index](ours) if len(self.projections) else ours
            square = (projected.float() - theirs.float()).square().mean(-1)
            sums.append((square * places.weights).sum())
        return torch.stack(sums).mean()


def _recompute_activations(model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        raise Conflict(
            f"{type(model).__name__} cannot compute its activations twice. Leave checkpointing out."
        )
    # transformers has renamed it (5.23 warns about the old name, 5.17 knows no other).
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
