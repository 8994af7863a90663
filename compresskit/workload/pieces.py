"""Pieces of natural text, cut to an exact number of tokens.

    text tokens   |phase| slot 0 | slot 1 | slot 2 | ...
                             └─ each slot is one prompt; the seed chooses the phase and the order

When more prompts are wanted than there are slots, further ones start at other, overlapping offsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit import text as texts
from compresskit.errors import InputError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from compresskit.spec import WorkloadSpec
    from compresskit.system import Tokenizer

_REPLACEMENT = "\ufffd"


def make(
    tokenizer: Tokenizer, text: texts.Text, workload: WorkloadSpec, rng: random.Random
) -> Iterator[list[int]]:
    """Pieces of `text`, in the chat template if the workload says so."""
    ids = tokenizer.encode(text.content, special=False)
    cut = chat if workload.chat else plain
    return cut(tokenizer, ids, workload.prompt_tokens, rng)


def plain(
    tokenizer: Tokenizer, ids: list[int], length: int, rng: random.Random
) -> Iterator[list[int]]:
    """Pieces as they are, behind a BOS token where the tokenizer adds one."""
    first = texts.bos(tokenizer)
    prefix = [] if first is None else [first]
    body = length - len(prefix)
    if body < 1:
        raise InputError(
            f"a prompt of {length} tokens leaves no room for text after the BOS token."
        )
    for start in starts(len(ids), body, rng):
        yield prefix + ids[start : start + body]


def chat(
    tokenizer: Tokenizer, ids: list[int], length: int, rng: random.Random
) -> Iterator[list[int]]:
    """Pieces as a user's turn."""
    overhead = len(tokenizer.chat(""))
    body = length - overhead
    if body < 1:
        raise InputError(
            f"the chat template alone takes {overhead} tokens, so a chat prompt cannot have "
            f"{length}. Ask for longer prompts."
        )
    for start in starts(len(ids), body, rng):
        row = fit(tokenizer, ids[start : start + body + SLACK], length, body, tokenizer.chat)
        if row is not None:
            yield row


SLACK = 8
"""How far off the expected length is tried: text merges differently once it is wrapped."""


def fit(
    tokenizer: Tokenizer,
    ids: list[int],
    length: int,
    body: int,
    wrap: Callable[[str], list[int]],
) -> list[int] | None:
    """Wrap the text of the first tokens of `ids`, about `body`, so that the whole has `length`."""
    for size in sorted(range(max(1, body - SLACK), len(ids) + 1), key=lambda n: abs(n - body)):
        user = tokenizer.decode(ids[:size])
        # A cut inside a character would put rubbish into the prompt.
        if _REPLACEMENT not in user and len(row := wrap(user)) == length:
            return row
    return None


def starts(total: int, size: int, rng: random.Random) -> Iterator[int]:
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
