"""Counts and digests: nothing here has noise, so equality is the test.

Fewer bytes or forward passes are `better`, more are `worse`; an output that is not what it was is
`changed`, whatever anyone thinks of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from compresskit.compare.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from compresskit.compare.line import Check, Judge
    from compresskit.compare.outcome import Word
    from compresskit.compare.two import Two
    from compresskit.record import MemoryPass, Record, Sample


class Sides(NamedTuple):
    """One quantity of both records; None where a record has none."""

    base: float | None
    new: float | None


def outcome(check: Check, word: Word, base: object, new: object, reason: str = "") -> Outcome:
    """An outcome of this tier."""
    return Outcome(
        tier=check.tier,
        metric=check.name,
        word=word,
        unit=check.unit,
        base=base if isinstance(base, int | float | str) else None,
        new=new if isinstance(new, int | float | str) else None,
        reason=reason,
        look=check.look,
    )


def word_of(check: Check, base: float, new: float) -> Word:
    """Equality, or which way it went."""
    if base == new:
        return "same"
    if check.better == "none":
        return "changed"
    return "better" if (new < base) == (check.better == "lower") else "worse"


def memory(record: Record) -> MemoryPass | None:
    """The bytes that were weighed last, as in the tables."""
    found = [block.passes.memory for block in record.blocks if block.passes.memory is not None]
    return found[-1] if found else None


def weighed(read: Callable[[MemoryPass], float]) -> Judge:
    """Compare one number of the memory pass."""

    def judge(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
        before, after = memory(two.base), memory(two.new)
        sides = Sides(
            None if before is None else read(before), None if after is None else read(after)
        )
        if (gone := _one_sided(check, sides)) is not None or sides.base is None:
            return gone
        return outcome(check, word_of(check, sides.base, sides.new or 0), sides.base, sides.new)

    return judge


def _one_sided(check: Check, sides: Sides) -> Outcome | None:
    """A number that only one side has is no verdict, but it is said."""
    if (sides.base is None) == (sides.new is None):
        return None
    side = "base" if sides.base is None else "new"
    return outcome(
        check, "not compared", sides.base, sides.new, f"the {side} record holds no such number"
    )


def by_class(read: Callable[[MemoryPass], Mapping[str, int]], *, of_cache: bool = False) -> Judge:
    """Compare bytes: the total decides; an equal total of other classes has `changed`."""

    def judge(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
        before, after = memory(two.base), memory(two.new)
        if before is None or after is None:
            return _one_sided(
                check,
                Sides(
                    None if before is None else sum(read(before).values()),
                    None if after is None else sum(read(after).values()),
                ),
            )
        one, other = read(before), read(after)
        total, now = sum(one.values()), sum(other.values())
        if of_cache and (before.batch, before.tokens_in_cache) != (
            after.batch,
            after.tokens_in_cache,
        ):
            shapes = [f"{m.batch} x {m.tokens_in_cache} tokens" for m in (before, after)]
            reason = f"the caches were weighed at {shapes[0]} and {shapes[1]}"
            return outcome(check, "changed", total, now, reason)
        word = word_of(check, total, now)
        # The first schema knew one sum only.
        moved = "" if {"held"} in (one.keys(), other.keys()) else _moved(one, other)
        if word == "same" and moved and two.base.digest == two.new.digest:
            word = "changed"
        return outcome(check, word, total, now, moved)

    return judge


def _moved(base: Mapping[str, int], new: Mapping[str, int]) -> str:
    names = [*base, *(name for name in new if name not in base)]
    return ", ".join(
        f"{name} {base.get(name, 0)} -> {new.get(name, 0)}"
        for name in names
        if base.get(name, 0) != new.get(name, 0)
    )


def per_sample(read: Callable[[Sample], int]) -> Judge:
    """Compare a count of each repetition: equal places ran the same prompts."""

    def judge(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
        base, new = two.samples
        if not two.common:
            return None
        pairs = [(place, read(base[place]), read(new[place])) for place in two.common]
        total, now = sum(one for _, one, _ in pairs), sum(other for _, _, other in pairs)
        if total == now == 0:
            return None
        unlike = [place for place, one, other in pairs if one != other]
        word = word_of(check, total, now)
        if unlike and word == "same":
            word = "changed"
        return outcome(check, word, total, now, _where(unlike, len(pairs)))

    return judge


def _where(unlike: list[tuple[str, int]], total: int) -> str:
    if not unlike:
        return ""
    name, index = unlike[0]
    return f"{len(unlike)} of {total} repetitions differ, first {name}, repetition {index + 1}"


def outputs(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """Hashes of the tokens that the speed passes delivered."""
    base, new = two.samples
    places = [p for p in two.common if base[p].tokens_sha256 and new[p].tokens_sha256]
    if not places:
        if not two.common:
            return None
        return outcome(check, "not compared", None, None, "a record holds no output hashes")
    unlike = [place for place in places if base[place].tokens_sha256 != new[place].tokens_sha256]
    shown = unlike[0] if unlike else places[0]
    return outcome(
        check,
        "changed" if unlike else "same",
        base[shown].tokens_sha256,
        new[shown].tokens_sha256,
        _where(unlike, len(places)),
    )


def greedy_outputs(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """Hashes of the greedy continuations, prompt by prompt."""
    hashes: list[tuple[str, ...] | None] = []
    for one in (two.base, two.new):
        found = None if one.quality is None else one.quality.greedy
        hashes.append(None if found is None else found.outputs_sha256)
    before, after = hashes
    if before is None and after is None:
        return None
    if not before or not after or len(before) != len(after):
        return outcome(check, "not compared", None, None, "a record holds no such output hashes")
    unlike = [
        index for index, pair in enumerate(zip(before, after, strict=True)) if len({*pair}) > 1
    ]
    shown = unlike[0] if unlike else 0
    reason = f"{len(unlike)} of {len(before)} prompts differ, first prompt {shown + 1}"
    word: Literal["changed", "same"] = "changed" if unlike else "same"
    return outcome(check, word, before[shown], after[shown], reason if unlike else "")


def kernels(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """Which implementation each operation ran."""
    before, after = two.base.kernels, two.new.kernels
    if not before and not after:
        return None
    unlike = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    shown = unlike or list(before)
    texts = [", ".join(f"{n}: {side.get(n, 'none')}" for n in shown) for side in (before, after)]
    return outcome(check, "changed" if unlike else "same", texts[0], texts[1])


def status(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """Did it run at all?"""
    before, after = two.base.status, two.new.status
    reason = two.new.reason or ""
    if before == after:
        return outcome(check, "same", before, after)
    if after == "ok":
        return outcome(check, "better", before, after, f"before: {two.base.reason}")
    return outcome(check, "worse" if before == "ok" else "changed", before, after, reason)


def sizes(check: Check, two: Two, tolerance: float | None) -> Outcome | None:
    """Passes that gave samples: a batch size that no longer fits is a loss."""
    base, new = ({name for name, _ in side} for side in two.samples)
    if not base and not new:
        return None
    lost, gained = sorted(base - new), sorted(new - base)
    word: Word = "worse" if lost else "better" if gained else "same"
    reasons = [
        one.reason
        for block in two.new.blocks
        for one in block.passes.throughput or ()
        if one.reason
    ]
    because = f" ({reasons[0]})" if lost and reasons else ""
    reason = f"lost: {', '.join(lost)}{because}" if lost else ""
    return outcome(check, word, len(base), len(new), reason or ", ".join(gained))
