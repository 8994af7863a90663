"""What a replay found, as one document and as lines for people.

Times to the first token are compared request by request (each was run both ways), hits and misses
apart: on a hit the store saves the prefix, on a miss it costs the lookup and the copies.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compresskit.stats import median, median_ratio
from compresskit.units import Unit, format_quantity, significant

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic import JsonValue

    from compresskit.methods.reuse._store import Store
    from compresskit.replay.play import Turn
    from compresskit.replay.trace import Trace

FORMAT = "compresskit-replay-1"


def document(
    trace: Trace,
    turns: Sequence[Turn],
    store: Store,
    facts: Mapping[str, JsonValue],
    *,
    spec: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole result.

    Args:
        trace: what was read.
        turns: what was played, in order.
        store: as it is now.
        facts: `prefix_store` of the system: its size.
        spec: digest, label, model and device of the run.
    """
    counted = asdict(store.statistics)
    looked_up = store.statistics.prompt_tokens
    held = store.stored_tokens * int(str(facts["bytes_per_token"]))
    found = {
        **counted,
        "hit_ratio": store.statistics.hit_tokens / looked_up if looked_up else None,
        "lookup_seconds": sum(turn.lookup_seconds for turn in turns),
        # The middle request: a lookup takes microseconds, and one that the system interrupts, more.
        "lookup_ns_per_token": median(
            [1e9 * turn.lookup_seconds / turn.prompt_tokens for turn in turns]
        ),
        "stored_tokens": store.stored_tokens,
        "stored_bytes": held,
    }
    compared = [turn.same_tokens for turn in turns if turn.same_tokens is not None]
    return {
        "format": FORMAT,
        **spec,
        "requests": len(turns),
        "skipped_lines": list(trace.skipped),
        "store": dict(facts),
        "statistics": found,
        "ttft": {
            "hit": _side([turn for turn in turns if turn.hit_tokens], "no request hit the store"),
            "miss": _side([turn for turn in turns if not turn.hit_tokens], "every request hit"),
            "all": _side(list(turns), "the trace is empty"),
        },
        "answers": {"compared": len(compared), "identical": sum(compared)},
        "turns": [asdict(turn) for turn in turns],
    }


def _side(turns: list[Turn], reason: str) -> dict[str, Any]:
    if not turns:
        return {"requests": 0, "unavailable": reason}
    found: dict[str, Any] = {
        "requests": len(turns),
        "prompt_tokens_median": median([float(turn.prompt_tokens) for turn in turns]),
        "hit_share_median": median([turn.hit_tokens / turn.prompt_tokens for turn in turns]),
        "seconds_median": median([turn.ttft_seconds for turn in turns]),
    }
    pairs = [
        (turn.computed_ttft_seconds, turn.ttft_seconds)
        for turn in turns
        if turn.computed_ttft_seconds is not None
    ]
    if not pairs:
        return {**found, "speedup": None, "unavailable": "not run without the store"}
    without, with_store = [a for a, _ in pairs], [b for _, b in pairs]
    ratio = median_ratio(without, with_store)
    return {
        **found,
        "computed_seconds_median": median(without),
        "speedup": ratio.value,
        "speedup_interval": [ratio.low, ratio.high],
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The document for people."""
    store, counted, answers = found["store"], found["statistics"], found["answers"]
    yield f"{found['label']} on {found['model']}, {found['device']}"
    yield (
        f"  store      {store['slots']} slots of {store['tokens_per_slot']} tokens, "
        f"{_bytes(store['bytes'])}; {store['bytes_per_token']} bytes a token"
    )
    yield (
        f"  requests   {found['requests']}, {counted['hits']} of them hits; "
        f"{len(found['skipped_lines'])} bad lines left out"
    )
    if counted["hit_ratio"] is not None:
        yield (
            f"  tokens     {counted['hit_tokens']} of {counted['prompt_tokens']} not computed "
            f"(hit ratio {100 * counted['hit_ratio']:.1f} %)"
        )
        yield (
            f"  lookup     {significant(counted['lookup_ns_per_token'])} ns/token (median), "
            f"{_seconds(counted['lookup_seconds'])} in all"
        )
    yield (
        f"  held       {counted['stored_tokens']} tokens, {_bytes(counted['stored_bytes'])}; evicted "
        f"{counted['evicted_tokens']}, of these to host memory {counted['spilled_tokens']}, back from "
        f"it {counted['fetched_tokens']}"
    )
    for name, side in found["ttft"].items():
        yield f"  TTFT {name:<5} {_ttft(side)}"
    if answers["compared"]:
        yield f"  answers    {answers['identical']} of {answers['compared']} identical"


def _ttft(side: Mapping[str, Any]) -> str:
    if not side["requests"]:
        return f"unavailable: {side['unavailable']}"
    what = (
        f"{_seconds(side['seconds_median'])} (median of {side['requests']}, "
        f"{significant(side['prompt_tokens_median'])} tokens, "
        f"{100 * side['hit_share_median']:.0f} % stored)"
    )
    if side.get("speedup") is None:
        return what
    low, high = side["speedup_interval"]
    return (
        f"{what}; without the store {_seconds(side['computed_seconds_median'])}: "
        f"{significant(side['speedup'])}x [{significant(low)}, {significant(high)}]"
    )


def _seconds(value: float) -> str:
    return format_quantity(value, Unit.SECOND)


def _bytes(value: float) -> str:
    return format_quantity(value, Unit.BYTE)
