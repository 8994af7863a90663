"""What a replay found, as one document and as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.drafts.counts import total
from compresskit.units import significant

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compresskit.drafts.counts import Steps
    from compresskit.drafts.trace import Entry

FORMAT = "compresskit-drafts-1"
HEADS = (
    "drafter", "requests", "tokens", "passes", "tokens/pass", "drafted", "accepted", "rate", "length",
)  # fmt: skip


class Played(NamedTuple):
    """One drafter, replayed."""

    name: str
    """As the user typed it."""
    label: str
    """With all parameters."""
    draft: int
    """Most tokens of a draft."""
    requests: Sequence[Steps]
    """What became of each request, in the order of the trace."""


def document(entries: Sequence[Entry], played: Sequence[Played], *, source: str) -> dict[str, Any]:
    """The whole result.

    Args:
        entries: what was replayed.
        played: the drafters, in the order asked for.
        source: where the trace came from.
    """
    categories = list(dict.fromkeys(entry.category for entry in entries))
    rows = []
    for one in played:
        groups: dict[str, list[Steps]] = {category: [] for category in categories}
        for entry, steps in zip(entries, one.requests, strict=True):
            groups[entry.category].append(steps)
        rows.append(
            {
                "name": one.name,
                "method": one.label,
                **total(one.requests, draft=one.draft),
                "by_category": {
                    category: total(group, draft=one.draft) for category, group in groups.items()
                },
            }
        )
    return {
        "format": FORMAT,
        "trace": source,
        "models": sorted({entry.model for entry in entries if entry.model}),
        "tokenizer_sha256": next((e.tokenizer_sha256 for e in entries if e.tokenizer_sha256), None),
        "sampling": "greedy",
        "methods": rows,
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The document for people: a row per method, and one per category where there are several."""
    rows: list[tuple[str, ...]] = [HEADS]
    for one in found["methods"]:
        rows.append(_row(one["name"], one))
        if len(one["by_category"]) > 1:
            rows += [_row(f"  {_plain(name)}", part) for name, part in one["by_category"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "  ".join(cells).rstrip()
    yield ""
    yield (
        "passes: after the prompt's; tokens/pass without the token that came with the prompt. "
        "length: mean tokens of the passes that had a draft, the model's own included. Counts are "
        "exact for greedy decoding; no time is measured."
    )


def _row(label: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        label,
        str(one["num_requests"]),
        str(one["num_generated_tokens"]),
        str(one["num_verify_forwards"]),
        _number(one["tokens_per_verify_forward"]),
        str(one["num_draft_tokens"]),
        str(one["num_accepted_draft_tokens"]),
        _number(one["draft_acceptance_rate"]),
        _number(one["mean_acceptance_length"]),
    )


def _plain(name: str) -> str:
    """A category as it may be printed: a file could name one by control characters."""
    return (name if name.isprintable() else ascii(name)) or "-"


def _number(value: float | None) -> str:
    return "n/a" if value is None else significant(value)
