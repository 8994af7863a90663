"""What rows of one table have in common, and what each of them is called.

Rows that may be compared at a glance share a key. Names come from files that others may have
written, so control characters are kept away from terminals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics import main_batch

if TYPE_CHECKING:
    from compresskit.record import Record


def group_key(record: Record) -> str:
    """Same key, same table."""
    model = record.model
    return repr(
        (
            record.spec.model.name,
            model and (model.revision, model.tokenizer_sha256, model.dtype),
            record.device and record.device.name,
            record.spec.workload,
            record.prompts and record.prompts.sha256,
            record.spec.protocol.threads,
        )
    )


def context(record: Record) -> dict[str, str | int]:
    """What stands above a table of records like this one."""
    spec, model, device = record.spec, record.model, record.device
    return {
        "model": clean(spec.model.name),
        "revision": _short_revision(model.revision) if model else "unknown revision",
        "baseline": _BASELINES.get(model.baseline, model.baseline.replace("_", " "))
        if model
        else "unknown baseline",
        "dtype": model.dtype if model else "unknown type",
        "device": clean(device.name) if device else "unknown device",
        "threads": spec.protocol.threads,
        "text": clean(spec.workload.text),
        "prompt_tokens": spec.workload.prompt_tokens,
        "new_tokens": spec.workload.new_tokens,
        "batch": main_batch(record),
    }


_BASELINES = {"random": "synthetic weights"}


def _short_revision(revision: str) -> str:
    """Twelve digits of a hash are enough to read; names stay whole."""
    is_hash = len(revision) >= 40 and all(letter in "0123456789abcdef" for letter in revision)
    return revision[:12] if is_hash else clean(revision)


def clean(words: str) -> str:
    """Replace control characters by question marks and runs of blanks by one."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(words.split()))


def short_label(record: Record) -> str:
    """The label without the mode, which has its own column."""
    return clean(record.label).removesuffix(f" ({record.spec.engine.manner})")


def labels(records: list[Record]) -> list[str]:
    """Labels that tell the rows apart: equal ones get their digest."""
    names = [(short_label(record), record.spec.engine.manner) for record in records]
    return [
        f"{name[0]} #{record.digest[:6]}" if names.count(name) > 1 else name[0]
        for name, record in zip(names, records, strict=True)
    ]
