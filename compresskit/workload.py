"""The prompts of the speed passes: natural text, cut to an exact number of tokens.

Random token ids would be unfair to whatever depends on content (n-gram speculation, routed
experts, evicting caches), and the same prompt again and again would be unfair to whatever stores
answers. So prompts are distinct pieces of one text:

    text tokens   |phase| slot 0 | slot 1 | slot 2 | ...
                             └─ each slot is one prompt; the seed chooses the phase and the order

When more prompts are wanted than there are slots, further ones start at other, overlapping
offsets; no two prompts are ever equal. With one seed, asking for more prompts only appends to the
list. A BOS token is part of a prompt, and of its length, if the tokenizer itself adds one.

A chat prompt is the template around such a piece, shortened until the whole has exactly the asked
number of tokens: speed rows stay comparable with plain prompts of that length.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from compresskit import text as texts
from compresskit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.record import TextFacts
    from compresskit.spec import WorkloadSpec
    from compresskit.system import Tokenizer

_REPLACEMENT = "\ufffd"


class Prompts(NamedTuple):
    """Prompts of equal length, with what identifies them."""

    ids: list[list[int]]
    facts: TextFacts
    """The text they were cut from; `tokens` counts the whole text."""
    sha256: str
    """Hash of the token ids of all prompts (int32 little-endian)."""


def prompts(tokenizer: Tokenizer, workload: WorkloadSpec, count: int, seed: int) -> Prompts:
    """Cut `count` distinct prompts of exactly `workload.prompt_tokens` tokens from the text.

    Raises:
        InputError: the text is unusable or too short, or chat was asked of a tokenizer that has
            no chat template.
    """
    if workload.chat and not tokenizer.has_chat_template:
        raise InputError(
            "this model's tokenizer has no chat template, so prompts cannot be wrapped in one. "
            "Leave chat out."
        )
    text = texts.load(workload.text)
    ids = tokenizer.encode(text.content, special=False)
    cut = _chat if workload.chat else _plain
    rows: dict[tuple[int, ...], None] = {}
    for row in cut(tokenizer, ids, workload.prompt_tokens, random.Random(seed)):
        if len(rows) == count:
            break
        rows.setdefault(tuple(row))
    if len(rows) < count:
        raise InputError(
            f"{text.source} has {len(ids)} tokens, which gives {len(rows)} distinct prompts of "
            f"{workload.prompt_tokens} tokens; {count} are needed. Use a longer text or shorter "
            "prompts."
        )
    found = [list(row) for row in rows]
    return Prompts(found, text.facts(len(ids)), texts.ids_sha256(found))


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


def _plain(
    tokenizer: Tokenizer, ids: list[int], length: int, rng: random.Random
) -> Iterator[list[int]]:
    first = texts.bos(tokenizer)
    prefix = [] if first is None else [first]
    body = length - len(prefix)
    if body < 1:
        raise InputError(
            f"a prompt of {length} tokens leaves no room for text after the BOS token."
        )
    for start in _starts(len(ids), body, rng):
        yield prefix + ids[start : start + body]


def _chat(
    tokenizer: Tokenizer, ids: list[int], length: int, rng: random.Random
) -> Iterator[list[int]]:
    overhead = len(tokenizer.chat(""))
    body = length - overhead
    if body < 1:
        raise InputError(
            f"the chat template alone takes {overhead} tokens, so a chat prompt cannot have "
            f"{length}. Ask for longer prompts."
        )
    for start in _starts(len(ids), body, rng):
        row = _fit(tokenizer, ids[start : start + body + _SLACK], length, body)
        if row is not None:
            yield row


_SLACK = 8
"""How far off the expected length is tried: text merges differently once it is wrapped."""


def _fit(tokenizer: Tokenizer, ids: list[int], length: int, body: int) -> list[int] | None:
    """Wrap the first tokens of `ids` so that the whole has `length` tokens, or None."""
    for size in sorted(range(max(1, body - _SLACK), len(ids) + 1), key=lambda n: abs(n - body)):
        user = tokenizer.decode(ids[:size])
        # A cut inside a character would put rubbish into the prompt.
        if _REPLACEMENT not in user and len(row := tokenizer.chat(user)) == length:
            return row
    return None


def _starts(total: int, size: int, rng: random.Random) -> Iterator[int]:
    """Offsets of pieces of `size` in `total`: disjoint ones first, then all the others."""
    room = total - size
    if room < 0:
        return
    # The remainder is all the freedom there is without losing a slot.
    phase = rng.randrange(total % size + 1)
    slots = list(range(phase, room + 1, size))
    rng.shuffle(slots)
    yield from slots
    others = sorted(set(range(room + 1)).difference(slots))
    rng.shuffle(others)
    yield from others
