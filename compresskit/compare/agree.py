"""What two records must share before they are compared, and what only some metrics ask for.

REFUSED   unlike things: any difference forbids the whole comparison
NEEDS     the machine and its software: a difference only silences the metrics that ask for it

Where a record of an older schema does not state a refused key, that is not held against it; a
metric that needs a key needs it stated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit import validity
from compresskit.metrics.training import student_revision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.record import Likelihood, Record


class Key(NamedTuple):
    """One thing to agree on; None where a record does not say."""

    name: str
    read: Callable[[Record], object]


def _package(name: str) -> Callable[[Record], object]:
    return lambda one: one.environment and one.environment.packages.get(name)


def _likelihood(read: Callable[[Likelihood], object]) -> Callable[[Record], object]:
    def of(one: Record) -> object:
        found = None if one.quality is None else one.quality.likelihood
        return None if found is None else read(found)

    return of


REFUSED = (
    Key("model", lambda one: one.spec.model.name),
    Key("model revision", lambda one: one.model and one.model.revision),
    Key("student", student_revision),
    Key("dtype", lambda one: one.model and one.model.dtype),
    Key("tokenizer", lambda one: one.model and one.model.tokenizer_sha256),
    Key("kind of device", lambda one: one.device and one.device.kind),
    Key("prompt text", lambda one: one.prompts and one.prompts.sha256),
    Key("prompts", lambda one: one.prompts_sha256),
    Key("quality protocol", _likelihood(lambda found: found.protocol_id)),
    Key(
        "task prompts",
        lambda one: one.quality and one.quality.tasks and one.quality.tasks.protocol_id,
    ),
    Key("quality text", _likelihood(lambda found: found.text.sha256)),
)
_SPEC_PARTS = ("workload", "sampling", "protocol", "quality", "seed")
"""Parts of a spec that must be equal where the specs as wholes are not."""

SPEC = Key("spec", lambda one: one.digest)
MACHINE = Key(
    "machine",
    lambda one: (
        None
        if one.device is None or one.environment is None or one.environment.cpu_count is None
        else f"{one.device.name}, {one.environment.cpu_count} CPUs"
    ),
)
TORCH = Key("torch", _package("torch"))
THREADS = Key("threads", lambda one: one.device and one.device.threads)


def refusals(base: Record, new: Record) -> Iterator[str]:
    """Every reason why these two must not be compared."""
    for side, one in (("base", base), ("new", new)):
        verdict = validity.judge(one)
        if one.status == "ok" and verdict.verdict == "INVALID":
            yield f"the {side} record is INVALID ({verdict.reasons[0]})"
    for key in REFUSED:
        before, after = key.read(base), key.read(new)
        if before is not None and after is not None and before != after:
            yield difference(key.name, before, after)
    if base.digest != new.digest:
        yield from _spec_differences(base, new)


def _spec_differences(base: Record, new: Record) -> Iterator[str]:
    for part in _SPEC_PARTS:
        before, after = getattr(base.spec, part), getattr(new.spec, part)
        if before == after:
            continue
        if part == "seed":
            yield difference(part, before, after)
            continue
        for field in type(before).model_fields:
            one, other = getattr(before, field), getattr(after, field)
            if one != other:
                yield difference(f"{part}.{field}", one, other)


def difference(name: str, base: object, new: object) -> str:
    """Name a key that differs, with both values."""
    return f"{name} differs: base {base!r}, new {new!r}"


def lacking(needs: tuple[Key, ...], base: Record, new: Record) -> str:
    """Say why a metric that needs these keys cannot be compared; empty if it can."""
    for key in needs:
        before, after = key.read(base), key.read(new)
        if before is None or after is None:
            return f"{key.name} is not stated in the {'base' if before is None else 'new'} record"
        if before != after:
            return difference(key.name, before, after)
    return ""
