"""A curve as one document: verdicts, break-even lengths, batch in a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.stats import judge, median

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compresskit.curve.measure import Point

FORMAT = "compresskit-curve-1"
DENSE = "dense"


def entry(points: Mapping[str, Point], weights: Mapping[str, int]) -> dict[str, Any]:
    """One length: every row's times, bytes and verdict against the dense cache."""
    base = points[DENSE].seconds
    found: dict[str, Any] = {}
    for name, point in points.items():
        row: dict[str, Any] = {
            "seconds_per_step": list(point.seconds),
            "median_seconds": median(point.seconds),
            "cache_bytes": point.cache_bytes,
            "weights_bytes": weights[name],
        }
        if name != DENSE:
            verdict = judge(base, point.seconds, lower_is_better=True, paired=True)
            row |= {
                "verdict": verdict.word,
                "ratio": verdict.ratio.value,
                "ratio_low": verdict.ratio.low,
                "ratio_high": verdict.ratio.high,
                "p": verdict.p,
            }
        found[name] = row
    return found


def break_even(lengths: Mapping[int, Mapping[str, Any]], name: str) -> str:
    """From which length on a row is faster than the dense cache, in words.

    A length counts only if the row is better there and at every longer one.
    """
    order = sorted(lengths)
    first = None
    for tokens in reversed(order):
        if lengths[tokens][name]["verdict"] != "better":
            break
        first = tokens
    if first is None:
        return f"not up to {order[-1]:,} tokens"
    before = [tokens for tokens in order if tokens < first]
    return f"between {before[-1]:,} and {first:,} tokens" if before else f"at {first:,} or less"


def reachable_batch(row: Mapping[str, Any], *, batch: int, memory: int) -> int:
    """Sequences whose caches fit into `memory` bytes beside the weights: an estimate.

    floor((memory - weights) / bytes of the cache per sequence); activations and the runtime are left
    out, so it is an upper bound.
    """
    per_row = sum(row["cache_bytes"].values()) / batch
    return max(0, int((memory - row["weights_bytes"]) // per_row))


def document(
    lengths: Mapping[int, Mapping[str, Any]],
    rows: Sequence[str],
    *,
    facts: Mapping[str, Any],
    batch: int,
    memory: int | None,
) -> dict[str, Any]:
    """Everything, ready to be printed, drawn or taken up again."""
    made: dict[str, Any] = {
        "format": FORMAT,
        **facts,
        "batch": batch,
        "rows": list(rows),
        "lengths": {str(tokens): lengths[tokens] for tokens in sorted(lengths)},
        "break_even": {name: break_even(lengths, name) for name in rows if name != DENSE},
    }
    if memory is not None:
        made["memory_bytes"] = memory
        made["reachable_batch_estimated"] = {
            name: {
                str(tokens): reachable_batch(lengths[tokens][name], batch=batch, memory=memory)
                for tokens in sorted(lengths)
            }
            for name in rows
        }
    return made
