"""A trace of requests: JSON, one object a line.

    {"prompt": "Translate: good morning", "new_tokens": 8}
    {"prompt": [1, 4093, 28, 198], "new_tokens": 8, "salt": "team-a", "at": 0.25}

prompt       text, or token ids
new_tokens   how many to decode
salt         requests share stored prefixes only under equal salts; optional
at           seconds since the first request, never decreasing; optional, kept but not waited for

A trace is read whole before any of it is used: one bad line is an error that names it, or, where
that was asked for, is counted and left out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from compresskit.errors import InputError
from compresskit.store import write_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pydantic import JsonValue

_KEYS = ("prompt", "new_tokens", "salt", "at")


@dataclass(frozen=True)
class Entry:
    """One request of a trace."""

    prompt: str | tuple[int, ...]
    """Text, or token ids."""
    new_tokens: int
    salt: str = ""
    at: float | None = None
    """Seconds since the first request."""
    line: int = 0
    """Where it stands in the file, from 1; 0 if it was made here."""

    def document(self) -> dict[str, JsonValue]:
        """As it is written."""
        prompt: JsonValue = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        found: dict[str, JsonValue] = {"prompt": prompt, "new_tokens": self.new_tokens}
        if self.salt:
            found["salt"] = self.salt
        if self.at is not None:
            found["at"] = self.at
        return found


class Trace(NamedTuple):
    """What a file holds."""

    entries: tuple[Entry, ...]
    skipped: tuple[str, ...]
    """What is wrong with each line that was left out."""


def load(path: Path, *, skip_bad: bool = False) -> Trace:
    """Read a trace; blank lines are ignored.

    Raises:
        InputError: the file cannot be read or holds no request, or, without `skip_bad`, a line is
            wrong.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    entries: list[Entry] = []
    skipped: list[str] = []
    latest = 0.0
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = _entry(line, number, latest)
        except ValueError as error:
            reason = f"{path}, line {number}: {error}"
            if not skip_bad:
                raise InputError(
                    f"{reason}. Correct the line, or leave bad ones out with --skip-bad."
                ) from None
            skipped.append(reason)
            continue
        latest = latest if entry.at is None else entry.at
        entries.append(entry)
    if not entries:
        raise InputError(f"{path}: holds no request ({len(skipped)} bad lines).")
    return Trace(tuple(entries), tuple(skipped))


def save(path: Path, entries: Iterable[Entry]) -> None:
    """Write a trace."""
    lines = (json.dumps(entry.document(), ensure_ascii=False) for entry in entries)
    write_text(path, "".join(f"{line}\n" for line in lines))


def _entry(line: bytes, number: int, latest: float) -> Entry:
    """Decode one line; a ValueError says what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not a request (nested too deeply)") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    unknown = sorted(set(found) - set(_KEYS))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} (known: {', '.join(_KEYS)})")
    for key in _KEYS[:2]:
        if key not in found:
            raise ValueError(f"{key!r} is missing")
    return Entry(
        prompt=_prompt(found["prompt"]),
        new_tokens=_new_tokens(found["new_tokens"]),
        salt=_salt(found.get("salt", "")),
        at=_at(found.get("at"), latest),
        line=number,
    )


def _prompt(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError("the prompt is empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt holds half a character (a lone surrogate)") from None
        return value
    if not isinstance(value, list):
        raise ValueError("'prompt' is neither text nor a list of token ids")
    if not value:
        raise ValueError("the prompt is empty")
    for token in value:
        if type(token) is not int or token < 0:
            raise ValueError(f"'prompt' holds {token!r}, which is no token id")
    return tuple(value)


def _new_tokens(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"'new_tokens' must be a whole number from 1 on, not {value!r}")
    return value


def _salt(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'salt' must be text, not {value!r}")
    return value


def _at(value: object, latest: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"'at' must be a number of seconds, not {value!r}")
    if value < latest:
        raise ValueError(f"'at' goes back from {latest} to {value} seconds")
    return float(value)
