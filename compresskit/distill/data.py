"""Rows of tokens to learn from, and the rows that nothing is learned from.

    text ──► one stream of tokens ──► rows of L tokens ──► every sixteenth: held out
                                                     └───► the rest: learned from, in order

A text is one stream: a blank line parts paragraphs as well as documents, and an end-of-text token
where there is none would teach a wrong end. Who wants ends, or weights of single tokens, packs rows
himself (`rows:FILE.safetensors`). A tokenizer that puts a beginning-of-text token before every text
gets one at the head of every row. A rest shorter than a row is left out.

The order follows from the step alone: each epoch is a permutation seeded by its number, so that a
training that is resumed reads on where it stopped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from compresskit import text as texts
from compresskit.distill.batch import Batch
from compresskit.errors import InputError

if TYPE_CHECKING:
    from compresskit.system import Tokenizer

KEPT_APART = 16
"""One row of so many is held out where no other text is named."""
_PREFIX = "rows:"
_SPAN = 32
"""Tokens in a row that count as the same text when they occur twice."""
_OVERLAP = 0.1
"""Share of the held-out spans that may occur in the training text: licences and boilerplate do."""


@dataclass(frozen=True)
class Rows:
    """Token rows with the weight of each token."""

    tokens: torch.Tensor
    """int64 `[R, L]`."""
    weights: torch.Tensor
    """float32 `[R, L]`."""
    source: str

    @cached_property
    def sha256(self) -> str:
        """Hash of shape, tokens (int32, little-endian) and weights."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.numpy().astype("<i4").tobytes())
        digest.update(self.weights.numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    def pick(self, numbers: torch.Tensor) -> Batch:
        """The rows of these numbers (int64 `[B]`)."""
        return Batch(self.tokens[numbers], self.weights[numbers], numbers)

    def part(self, numbers: torch.Tensor) -> Rows:
        """Some of the rows, as rows of their own."""
        return Rows(self.tokens[numbers], self.weights[numbers], self.source)


@dataclass(frozen=True)
class Data:
    """What is learned from, and what is not."""

    train: Rows
    held_out: Rows
    overlap: float
    """Share of the held-out spans of 32 tokens that occur in the training text."""


def load(
    source: str, held_out: str | None, tokenizer: Tokenizer, *, length: int, held_out_rows: int
) -> Data:
    """Read, tokenise and split.

    Raises:
        InputError: a text is missing, empty or too short, or the held-out one is learned from.
    """
    rows = _rows(source, tokenizer, length)
    numbers = torch.arange(len(rows))
    if held_out is None:
        apart = numbers % KEPT_APART == KEPT_APART - 1
        if not apart.any():
            _need(rows, KEPT_APART, "so that one can be held out (or name a text with --held-out)")
        train, kept = rows.part(numbers[~apart]), rows.part(numbers[apart])
    else:
        train, kept = rows, _rows(held_out, tokenizer, length)
    kept = _spread(kept, held_out_rows)
    overlap = _overlap(train.tokens, kept.tokens)
    if held_out is not None and overlap > _OVERLAP:
        raise InputError(
            f"--held-out {held_out}: {overlap:.0%} of it is in the training text ({source}). A student "
            "cannot be judged by what it learns from: name another text, or none."
        )
    return Data(train, kept, overlap)


def numbers_of(step: int, *, rows: int, batch: int, seed: int) -> torch.Tensor:
    """Numbers of the rows of a step, int64 `[batch]`; steps are counted from 0."""
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // rows
    orders = {epoch: _order(epoch, rows, seed) for epoch in set(epochs.tolist())}
    return torch.tensor(
        [int(orders[epoch][place]) for epoch, place in zip(epochs.tolist(), (places % rows).tolist(), strict=True)],
        dtype=torch.int64,
    )  # fmt: skip


def _order(epoch: int, rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def _rows(source: str, tokenizer: Tokenizer, length: int) -> Rows:
    if source.startswith(_PREFIX):
        return _packed(Path(source.removeprefix(_PREFIX)), source, length)
    bos = texts.bos(tokenizer)
    ids = tokenizer.encode(texts.load(source).content, special=False)
    fresh = length if bos is None else length - 1
    count = len(ids) // fresh
    if count < 1:
        raise InputError(
            f"{source}: {len(ids)} tokens do not fill one row of {length}. Name a longer text, or "
            "shorten the rows with --length."
        )
    tokens = torch.tensor(ids[: count * fresh], dtype=torch.int64).view(count, fresh)
    if bos is not None:
        tokens = torch.cat([torch.full((count, 1), bos), tokens], dim=1)
    return Rows(tokens, torch.ones(tokens.shape), source)


def _packed(path: Path, source: str, length: int) -> Rows:
    """Rows that somebody packed: `tokens` [R, L] and, if wanted, `weights` [R, L]."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{source}: not readable ({error}). It takes a safetensors file with `tokens` [R, L]."
        ) from None
    tokens = held.get("tokens")
    if tokens is None or tokens.ndim != 2 or tokens.is_floating_point():
        raise InputError(f"{source}: there have to be integers [R, L] called `tokens` in it.")
    if len(tokens) == 0:
        raise InputError(f"{source}: there are no rows in it.")
    if tokens.shape[1] != length:
        raise InputError(
            f"{source}: its rows have {tokens.shape[1]} tokens, not {length}. "
            f"Say --length {tokens.shape[1]}."
        )
    weights = held.get("weights", torch.ones(tokens.shape))
    if weights.shape != tokens.shape or not weights.float().isfinite().all() or (weights < 0).any():
        raise InputError(
            f"{source}: `weights` have to be of the shape of `tokens`, finite and not below 0."
        )
    if not weights[:, 1:].any(dim=1).all():
        empty = int((~weights[:, 1:].any(dim=1)).nonzero()[0])
        raise InputError(f"{source}: row {empty} weighs nothing. Leave such rows out.")
    return Rows(tokens.long(), weights.float(), source)


def check_ids(rows: Rows, vocabulary: int) -> None:
    """See that every token exists.

    Raises:
        InputError: some are not tokens of a vocabulary of this size.
    """
    highest, lowest = int(rows.tokens.max()), int(rows.tokens.min())
    if lowest < 0 or highest >= vocabulary:
        raise InputError(
            f"{rows.source}: token {highest if highest >= vocabulary else lowest} is not of this "
            f"model, whose tokens go from 0 to {vocabulary - 1}. Rows have to be packed with the "
            "tokenizer of the student."
        )


def check_enough(rows: Rows, batch: int) -> None:
    """See that one step does not read a row twice.

    Raises:
        InputError: a step asks for more rows than there are.
    """
    if len(rows) < batch:
        _need(rows, batch, "for one step")


def _need(rows: Rows, needed: int, why: str) -> None:
    raise InputError(
        f"{rows.source}: {len(rows)} rows of {rows.tokens.shape[1]} tokens, and {needed} are needed "
        f"{why}. Name a longer text, or lower --length or --batch."
    )


def _spread(rows: Rows, most: int) -> Rows:
    """At most so many rows, evenly from the whole."""
    if len(rows) <= most:
        return rows
    return rows.part(torch.linspace(0, len(rows) - 1, most).round().long())


def _overlap(train: torch.Tensor, kept: torch.Tensor) -> float:
    """Share of the spans of `kept` that occur in `train`, by a hash of each span."""
    span = min(_SPAN, train.shape[1], kept.shape[1])
    return float(np.isin(_hashes(kept, span), _hashes(train, span)).mean())


def _hashes(rows: torch.Tensor, span: int) -> np.ndarray:
    """uint64 of every span of `span` tokens within a row: a polynomial, modulo 2**64."""
    held = rows.numpy().astype(np.uint64) + np.uint64(1)
    places = held.shape[1] - span + 1
    total = np.zeros((len(held), places), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(span):
            total = total * np.uint64(0x9E3779B97F4A7C15) + held[:, offset : offset + places]
    return total.ravel()
