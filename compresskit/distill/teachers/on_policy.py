"""Rows that the student writes itself, for the teacher to judge.

    row of the data     the quick brown fox | jumps over the lazy dog      prompt | real continuation
    row of the student  the quick brown fox | runs on a lazy bone          prompt | its own
    weights              0   0     0     0  |  1   1  1  1   1

A student taught on real text alone meets its own mistakes for the first time when it is used. Here
it meets them while the teacher is there to say what should have come next.

Only its own tokens count. The prompt is real text, which the other rows teach, with its real
continuation; and what the divergence on such rows stands for is an expectation over the student's
distribution of continuations, to which a prompt does not belong. These rows have no right tokens
either: a cross-entropy with them would teach the student to believe itself, which `check` refuses.

Paper: Agarwal et al. 2023, Generalized Knowledge Distillation (GKD), arXiv 2306.13649.
Differs: the mixing is by rows of a batch, not by whole batches; prompts are beginnings of rows of
the data; no gradient flows through the sampling (as there).
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from compresskit.distill.batch import Batch
from compresskit.distill.losses.term import CrossEntropy
from compresskit.distill.teachers import seeds
from compresskit.errors import SpecError
from compresskit.hf.continuation import continued
from compresskit.spec import SamplingSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from compresskit.distill.losses.term import Kind, Term


class Continue(Protocol):
    """Writes on where prompts end."""

    def __call__(self, prompts: torch.Tensor, new: int, seed: int) -> torch.Tensor:
        """Return int64 `[B, new]` after `prompts` `[B, P]`; what is drawn follows from `seed`."""


class Mixed(NamedTuple):
    """A batch with some rows of the student's own, and what writing them took."""

    batch: Batch
    rows: int
    """Rows that the student wrote."""
    generated_tokens: int
    seconds: float
    """Of the writing alone."""


def check(fraction: float, teacher: Kind, terms: Iterable[Term]) -> None:
    """Refuse what cannot be learned from rows of the student's own, before anything is trained.

    Raises:
        SpecError: the teacher is a cache, a term takes labels for right, or the fraction is no share.
    """
    if not 0 <= fraction <= 1:
        raise SpecError(f"the on-policy fraction is a share of the rows, 0 to 1, not {fraction}.")
    if fraction == 0:
        return
    if teacher != "dense":
        raise SpecError(
            f"a teacher cache ({teacher}) has not read what the student writes. Use the teacher "
            "online for on-policy rows, or set their fraction to 0."
        )
    for term in terms:
        if isinstance(term, CrossEntropy):
            raise SpecError(
                f"the term {term.name} would teach the student that its own tokens are right. Leave "
                f"{term.name} out, or set the on-policy fraction to 0."
            )


def by(model: Any, *, temperature: float = 1.0, autocast: torch.dtype | None = None) -> Continue:
    """Let `model` write, sampling at `temperature`; 0 is greedy.

    It is used as it stands at each call, so its weights may change in between.
    """
    sampling = SamplingSpec(temperature=float(temperature))

    def write(prompts: torch.Tensor, new: int, seed: int) -> torch.Tensor:
        kind = prompts.device.type
        with nullcontext() if autocast is None else torch.autocast(kind, dtype=autocast):
            return continued(model, prompts, new, sampling=sampling, seed=seed)

    return write


def mixed(
    batch: Batch,
    fraction: float,
    write: Continue,
    *,
    seed: int,
    step: int,
    prompt_share: float = 0.5,
    stop: tuple[int, ...] = (),
    synchronize: Callable[[], None] = lambda: None,
) -> Mixed:
    """Replace `fraction` of the rows by the beginnings of the same rows, continued by `write`.

    Which rows, and what is drawn, follows from `seed`, `step` and the weights. Where the fraction is
    no whole number of rows, one row more or less is taken at random, so that it holds on average.

    prompt_share: share of a row that is kept as its beginning, rounded to at least one token and at
    most all but one. stop: tokens that end a text; behind the first one written nothing counts.
    synchronize: waits for the device, for the seconds.

    Raises:
        SpecError: a share is not between 0 and 1, or the rows are too short.
    """
    count, length = batch.tokens.shape
    if not 0 <= fraction <= 1:
        raise SpecError(f"the on-policy fraction is a share of the rows, 0 to 1, not {fraction}.")
    if not 0 < prompt_share < 1:
        raise SpecError(
            f"the prompt's share of an on-policy row lies between 0 and 1, not at {prompt_share}."
        )
    if length < 2:
        raise SpecError(f"rows of {length} tokens leave nothing to write. Use longer rows.")
    drawing = seeds.generator("on-policy", seed, step)
    whole, extra = divmod(fraction * count, 1)
    taken = int(whole) + int(torch.rand((), generator=drawing).item() < extra)
    if taken == 0:
        return Mixed(batch, 0, 0, 0.0)
    chosen = torch.randperm(count, generator=drawing)[:taken].sort().values
    chosen = chosen.to(batch.tokens.device)
    kept = min(max(round(prompt_share * length), 1), length - 1)
    synchronize()
    began = time.perf_counter()
    written = write(
        batch.tokens[chosen, :kept], length - kept, seeds.number("on-policy text", seed, step)
    )
    synchronize()
    seconds = time.perf_counter() - began
    tokens, weights, rows = batch.tokens.clone(), batch.weights.clone(), batch.rows.clone()
    tokens[chosen, kept:] = written
    weights[chosen] = 0.0
    weights[chosen, kept:] = _until(written, stop).to(weights)
    rows[chosen.to(rows.device)] = -1
    return Mixed(Batch(tokens, weights, rows), taken, written.numel(), seconds)


def _until(written: torch.Tensor, stop: tuple[int, ...]) -> torch.Tensor:
    """True `[B, n]` up to the first stop token of each row, that one included."""
    if not stop:
        return torch.ones_like(written, dtype=torch.bool)
    ends = torch.isin(written, torch.tensor(stop, device=written.device)).long()
    return ends.cumsum(-1) - ends == 0
