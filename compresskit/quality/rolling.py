"""Word and byte perplexity as lm-evaluation-harness defines them, to meet published numbers.

A document is scored whole, every token once, with as much context as fits:

    first window     prefix token + first L tokens, all scored            (L = max_length)
    later windows    the last L tokens before the window's end; those not yet scored are

    L = 4     in  P a b c      scores a b c d
              in  d e f g      scores e f g h
              in  f g h i      scores i j            <- a short tail gets a longer context

The prefix is one the caller names, else BOS, else end-of-text. Word and byte counts are of the
original document, even if what is scored was detokenised.

    word perplexity   exp(-sum of log-likelihoods / sum of words)
    byte perplexity   exp(-sum of log-likelihoods / sum of UTF-8 bytes)
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.errors import InputError, SpecError
from compresskit.quality.protocol import Cut
from compresskit.quality.score import nll
from compresskit.quality.walk import LARGEST_FORWARD, probe, walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from compresskit.system import System, Tokenizer


class Rolling(NamedTuple):
    """Log-likelihood (nats) of a document, with its size."""

    log_likelihood: float
    words: int
    bytes: int


class Window(NamedTuple):
    """Inputs of one forward pass; the last `scored` of them predict `targets`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def rolling(
    system: System,
    document: str,
    max_length: int,
    *,
    prefix: int | None = None,
    original: str | None = None,
) -> Rolling:
    """Score `document` in windows of at most `max_length` inputs.

    Args:
        system: the artefact; each window goes through a fresh cache.
        document: the text that is scored.
        max_length: inputs per window.
        prefix: first token instead of BOS or end-of-text.
        original: the text whose words and bytes count, if `document` was detokenised.

    Raises:
        InputError: nothing can serve as prefix.
        SpecError: `max_length` is below 1 or above the model's context.
    """
    if not 1 <= max_length <= system.context:
        raise SpecError(
            f"max_length must be from 1 to the model's context, {system.context}; not {max_length}."
        )
    first = _prefix(system.tokenizer) if prefix is None else prefix
    ids = system.tokenizer.encode(document, special=False)
    total = 0.0
    for window in windows(ids, first, max_length):
        total -= _nll(system, window)
    counted = document if original is None else original
    # Splitting at runs of white space counts an empty word at either end: so do the harness' tasks.
    return Rolling(total, len(re.split(r"\s+", counted)), len(counted.encode()))


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[Window]:
    """Cut a document so that every token is scored once.

    >>> [(w.inputs, w.targets) for w in windows([1, 2, 3, 4, 5], 0, 3)]
    [((0, 1, 2), (1, 2, 3)), ((2, 3, 4), (4, 5))]
    """
    stream = (prefix, *ids)
    for start in range(0, len(ids), length):
        stop = min(start + length, len(ids))
        yield Window(stream[max(0, stop - length) : stop], tuple(ids[start:stop]))


def word_perplexity(documents: Iterable[Rolling]) -> float:
    """Perplexity per word over documents."""
    found = list(documents)
    return math.exp(-sum(d.log_likelihood for d in found) / sum(d.words for d in found))


def byte_perplexity(documents: Iterable[Rolling]) -> float:
    """Perplexity per UTF-8 byte over documents."""
    found = list(documents)
    return math.exp(-sum(d.log_likelihood for d in found) / sum(d.bytes for d in found))


def _prefix(tokenizer: Tokenizer) -> int:
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if not tokenizer.eos_ids:
        raise InputError(
            "this tokenizer has neither a BOS nor an end-of-text token: name the prefix token."
        )
    return tokenizer.eos_ids[0]


def _nll(system: System, window: Window) -> float:
    tokens = torch.tensor([window.inputs], device=system.device.torch)
    targets = torch.tensor([window.targets], device=system.device.torch)
    context = len(window.inputs) - len(window.targets)
    size = probe(system, window.inputs).positions(LARGEST_FORWARD, 1)
    cuts = [
        Cut(at, min(at + size, tokens.shape[1]), True) for at in range(0, tokens.shape[1], size)
    ]
    total = 0.0

    def see(position: int, logits: torch.Tensor) -> None:
        nonlocal total
        skip = max(0, context - position)
        scored = logits[:, skip:]
        if scored.shape[1]:
            at = position + skip - context
            total += float(nll(scored, targets[:, at : at + scored.shape[1]]).double().sum())

    walk(system, tokens, cuts, see)
    return total
