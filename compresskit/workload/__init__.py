"""The prompts of the speed passes: pieces of natural text, texts to be copied, or questions.

    TEXT                     natural text (any source of `compresskit.text`), cut to an exact length
    copy[:TEXT]              a passage, and the request to write it once more, begun
    edit                     generated code, and the request to write it with a name changed, begun
    questions:FILE[#KIND]    questions of a data set, of one kind; lengths as they come

What speculation, eviction or prompt compression gain depends on the kind of work, so a table of them
has a row for each kind. A text's answer copies little of its prompt, `copy` nearly all, `edit` most.

Random token ids would be unfair to whatever depends on content (n-gram speculation, routed
experts, evicting caches), and the same prompt again and again would be unfair to whatever stores
answers, so prompts are natural and no two are ever equal. With one seed, asking for more prompts only
appends to the list. A BOS token is part of a prompt, and of its length, if the tokenizer itself adds
one. A chat prompt is the template around such a piece, shortened until the whole has exactly the
asked number of tokens: speed rows stay comparable with plain prompts of that length.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from compresskit import text as texts
from compresskit.errors import InputError
from compresskit.workload import copying, pieces, questions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compresskit.record import TextFacts
    from compresskit.spec import WorkloadSpec
    from compresskit.system import Tokenizer


class Prompts(NamedTuple):
    """Prompts, with what identifies them."""

    ids: list[list[int]]
    facts: TextFacts
    """The text they were made from; `tokens` counts the whole text."""
    sha256: str
    """Hash of the token ids of all prompts (int32 little-endian)."""


def prompts(tokenizer: Tokenizer, workload: WorkloadSpec, count: int, seed: int) -> Prompts:
    """Make `count` distinct prompts of exactly (questions: at most) `workload.prompt_tokens` tokens.

    Raises:
        InputError: the text is unusable or too short, or chat was asked of a tokenizer that has
            no chat template.
    """
    if workload.chat and not tokenizer.has_chat_template:
        raise InputError(
            "this model's tokenizer has no chat template, so prompts cannot be wrapped in one. "
            "Leave chat out."
        )
    rng = random.Random(seed)
    kind, _, source = workload.text.partition(":")
    found: Iterable[list[int]]
    if kind == "questions":
        text, found = questions.make(tokenizer, source, workload, rng)
    elif kind in copying.KINDS:
        text, found = copying.make(tokenizer, kind, source, workload, rng)
    else:
        text = texts.load(workload.text)
        found = pieces.make(tokenizer, text, workload, rng)
    rows: dict[tuple[int, ...], None] = {}
    for row in found:
        if len(rows) == count:
            break
        rows.setdefault(tuple(row))
    total = len(tokenizer.encode(text.content, special=False))
    if len(rows) < count:
        raise InputError(
            f"{text.source} has {total} tokens, which gives {len(rows)} distinct prompts of "
            f"{workload.prompt_tokens} tokens; {count} are needed. "
            + (
                "Allow longer prompts (prompt_tokens), or take fewer repetitions."
                if kind == "questions"
                else "Use a longer text or shorter prompts."
            )
        )
    ids = [list(row) for row in rows]
    return Prompts(ids, text.facts(total), texts.ids_sha256(ids))


def calibration(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    """Return the first `count` tokens of `text`.

    The text called `calibration` shares nothing with the held-out one.

    Raises:
        InputError: the text has fewer.
    """
    ids = tokenizer.encode(texts.load(text).content, special=False)
    if len(ids) < count:
        raise InputError(
            f"the calibration text {text!r} has {len(ids)} tokens; {count} are wanted. Calibrate on "
            "fewer, or on a longer text."
        )
    return ids[:count]
