"""Pack documents into training rows of one length.

    row = <|bos|> document <|end|> document \\n\\n document <|end|> <|pad|> ...

- A document is never cut, so no question loses its fact; what does not fit waits for another row.
- At most one document with facts per row: two would state different codes for the same name.
- Half of the joins are `<|end|>`, half a blank line, so that plain text files (documents joined by
  blank lines) look familiar; one row in ten has no `<|bos|>`, like a window cut out of a text.
- Each token has a weight in the loss: 0 padding, 1 text, more for answers that must be looked up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.tiny.corpus import SEPARATOR, document
from benchmarks.tiny.dice import Dice
from benchmarks.tiny.tokenizer import BOS, EOS, PAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from benchmarks.tiny.domains import Document

WAITING = 48
"""Documents to choose from when filling a row."""


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: short contexts first, where recall is learned fastest."""

    name: str
    first: int
    """Index of the first document."""
    context: int
    """Tokens in a row."""
    batch: int
    """Rows in a step."""
    steps: int
    longest: int
    """Longest document, in characters (see `corpus.document`)."""
    answer_weight: int
    first_weight: int
    """Weight of an answer's first digit, or of a word: it alone depends on whose value is asked."""
    stated_weight: int = 1
    """Weight of a value's first statement. Nobody can predict it: in the first lesson it is 0."""
    drills: int = 0
    """Of every four documents, how many are of `lesson` whatever the corpus's mix says."""
    lesson: str = "drill"


@dataclass(frozen=True)
class Rows:
    """The rows of a stage: `tokens` and `weights` of shape [rows, context]."""

    tokens: np.ndarray
    weights: np.ndarray
    digest: str
    """SHA-256 over the bytes of `tokens`."""


@dataclass(frozen=True)
class _Encoded:
    tokens: list[int]
    weights: list[int]
    facts: bool


def _encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[Document], stage: Stage
) -> list[_Encoded]:
    found = tokenizer._tokenizer.encode_batch([t.text for t in texts], add_special_tokens=False)
    encoded = []
    for text, entry in zip(texts, found, strict=True):
        marks = [1] * len(text.text)
        # Statements first: one that is itself an answer (asked twice) then counts as an answer.
        for answer in text.answers:
            length = answer.stop - answer.start
            marks[answer.stated : answer.stated + length] = [stage.stated_weight] * length
        for answer in text.answers:
            length = answer.stop - answer.start
            marks[answer.start : answer.stop] = [stage.answer_weight] * length
            # The digits after the first follow from those before, whoever they belong to.
            key = 1 if text.text[answer.start].isdigit() else length
            marks[answer.start : answer.start + key] = [stage.first_weight] * key
        # A token belongs where its last character does (" green" starts before the answer).
        weights = [marks[stop - 1] for _, stop in entry.offsets]
        encoded.append(_Encoded(entry.ids, weights, bool(text.answers)))
    return encoded


def _stream(tokenizer: PreTrainedTokenizerFast, stage: Stage) -> Iterator[_Encoded]:
    start, chunk = stage.first, 2000
    while True:
        texts = [
            document(index, stage.longest, stage.lesson if index % 4 < stage.drills else None)
            for index in range(start, start + chunk)
        ]
        yield from (
            entry
            for entry in _encode(tokenizer, texts, stage)
            if len(entry.tokens) < stage.context - 1
        )
        start += chunk


def pack(tokenizer: PreTrainedTokenizerFast, stage: Stage, rows: int) -> Rows:
    """Fill `rows` rows with the documents of `stage`."""
    dice = Dice(stage.first)
    stream = _stream(tokenizer, stage)
    waiting = [next(stream) for _ in range(WAITING)]
    join = tokenizer.encode(SEPARATOR, add_special_tokens=False)
    tokens = np.full((rows, stage.context), PAD, dtype=np.uint16)
    weights = np.zeros((rows, stage.context), dtype=np.uint8)
    for row in range(rows):
        ids: list[int] = [BOS] if dice.chance(0.9) else []
        weight = [1] * len(ids)
        facts = False
        while True:
            room = stage.context - len(ids) - len(join)
            fits = [
                i
                for i, w in enumerate(waiting)
                if len(w.tokens) <= room and not (facts and w.facts)
            ]
            if not fits:
                break
            # The oldest that fits opens the row (so that nothing waits for ever), the longest
            # that fits fills it.
            best = fits[0] if len(ids) <= 1 else max(fits, key=lambda i: len(waiting[i].tokens))
            chosen = waiting.pop(best)
            waiting.append(next(stream))
            facts |= chosen.facts
            end = [EOS] if dice.chance(0.5) else join
            ids += chosen.tokens + end
            weight += chosen.weights + [1] * len(end)
        tokens[row, : len(ids)] = ids
        weights[row, : len(ids)] = weight
    return Rows(tokens, weights, hashlib.sha256(tokens.tobytes()).hexdigest())


def load_or_pack(tokenizer: PreTrainedTokenizerFast, stage: Stage, folder: Path) -> Rows:
    """Return the rows of `stage`, from `folder` when they were packed before."""
    key = hashlib.sha256(f"{stage!r}{tokenizer._tokenizer.to_str()}".encode()).hexdigest()[:12]
    path = folder / f"{stage.name}-{key}.npz"
    if not path.exists():
        rows = pack(tokenizer, stage, stage.steps * stage.batch)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, tokens=rows.tokens, weights=rows.weights)
        partial.replace(path)
    stored = np.load(path)
    tokens = stored["tokens"]
    return Rows(tokens, stored["weights"], hashlib.sha256(tokens.tobytes()).hexdigest())
