"""Where audits meet the rest: which stacks can be audited, and what a run's record keeps of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit import store
from compresskit.errors import Conflict, Incomparable, UsageError
from compresskit.method import Stage
from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._verify import verify
from compresskit.traits import Trait

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compresskit.audit.document import Audit
    from compresskit.method import Placed
    from compresskit.spec import RunSpec


def auditable(methods: Sequence[Placed], traits: frozenset[Trait], batch: int) -> bool:
    """Whether our rule of acceptance is part of the stack's loop.

    Raises:
        UsageError: nothing in the stack has a loop of its own.
        Conflict: the stack cannot decode the batch.
    """
    loops = [placed.method for placed in methods if placed.method.stage is Stage.DECODE]
    if not loops:
        raise UsageError(
            "an audit compares a method's own decode loop with plain decoding of the same model, and "
            "this stack has none. Give one with --method, such as speculative/ngram."
        )
    if batch > 1 and not {Trait.BATCH, Trait.PADDED_BATCH} <= traits:
        raise Conflict(
            f"batch {batch}: this stack decodes no rows of different lengths together. Use --batch 1."
        )
    return any(isinstance(one, Speculative) and one.judge() is verify for one in loops)


def into(path: Path, audit: Audit, spec: RunSpec) -> None:
    """Write the summary of `audit` of `spec` into the record at `path`, as `facts["audit"]`.

    Raises:
        RecordError: the record cannot be read.
        Incomparable: the record is of another model, stack, engine or device.
    """
    record = store.load(path)
    theirs, ours = (one.model_dump(mode="json") for one in (record.spec, spec))
    unlike = [part for part in ("model", "engine", "stack") if theirs[part] != ours[part]]
    if record.device is not None and record.device.name != audit.device:
        unlike.append("device")
    if unlike:
        raise Incomparable(
            f"{path} is a record of another {' and '.join(unlike)} than was audited. Audit what it "
            "holds, or leave --record out."
        )
    facts = {**record.facts, "audit": audit.summary()}
    store.write_text(path, store.dumps(record.model_copy(update={"facts": facts})))
