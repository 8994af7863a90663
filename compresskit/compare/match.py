"""Find for each new record the one it is compared with.

Equal digests were asked for the same thing: two states of the code. Where each side is exactly one
record with different specs, they are compared as given: a variant against its dense run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit.compare.agree import MACHINE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.record import Record


class Matched(NamedTuple):
    """Pairs of (base, new), and what has no partner."""

    pairs: list[tuple[Record, Record]]
    only_base: list[Record]
    only_new: list[Record]
    notes: list[str]


def match(base: Sequence[Record], new: Sequence[Record]) -> Matched:
    """Pair the records of two sides."""
    if len(base) == 1 and len(new) == 1 and base[0].digest != new[0].digest:
        return Matched([(base[0], new[0])], [], [], [])
    notes: list[str] = []
    theirs = _by_digest(base)
    ours = {digest: _newest("new", found, None, notes) for digest, found in _by_digest(new).items()}
    pairs = [
        (_newest("base", theirs[digest], one, notes), one)
        for digest, one in ours.items()
        if digest in theirs
    ]
    only_base = [found[-1] for digest, found in theirs.items() if digest not in ours]
    return Matched(pairs, only_base, [o for d, o in ours.items() if d not in theirs], notes)


def _by_digest(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for one in records:
        same = found.setdefault(one.digest, [])
        if one not in same:
            same.append(one)
    return found


def _newest(side: str, found: list[Record], other: Record | None, notes: list[str]) -> Record:
    """Of several records of one spec, the newest that was made on the other side's machine."""
    if len(found) == 1:
        return found[0]
    machine = None if other is None else MACHINE.read(other)
    chosen = max(found, key=lambda one: (MACHINE.read(one) == machine, one.started_at))
    notes.append(
        f"{len(found)} {side} records of {chosen.label} ({chosen.digest}): "
        f"took the one of {chosen.started_at}"
    )
    return chosen
