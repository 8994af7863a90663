"""The records as a table: median time, share of the copy bandwidth, speed against the baseline."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.gpu.arms import OURS

HEAD = ("operation", "shape", "arm", "µs", "of copy", "speed", "")


def render(records: list[dict[str, Any]]) -> str:
    """Text of a table with one line per arm."""
    lines = [HEAD]
    for record in records:
        seconds = {arm["name"]: _seconds(arm) for arm in record["arms"]}
        base = seconds.get(record["baseline"])
        shape = " ".join(f"{key}={value}" for key, value in record["shape"].items())
        for arm in record["arms"]:
            own = seconds[arm["name"]]
            remark = "" if arm["status"] == "ok" else f"{arm['status']}: {arm['reason']}"
            if own is not None and not arm.get("graph", True):
                remark = f"no graph {remark}".strip()
            lines.append(
                (
                    record["op"],
                    shape,
                    arm["name"],
                    "-" if own is None else f"{1e6 * own:.1f}",
                    _share(arm, own, record),
                    "-" if own is None or base is None else f"{base / own:.2f}x",
                    remark[:90],
                )
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def faults(records: list[dict[str, Any]]) -> list[str]:
    """Entries where our own kernel is wrong or failed."""
    return [
        f"{record['op']} {arm['reason']}"
        for record in records
        for arm in record["arms"]
        if arm["name"].startswith(OURS) and arm["status"] in ("wrong", "failed")
    ]


def _seconds(arm: dict[str, Any]) -> float | None:
    """Median, unless the result was wrong: a wrong kernel has no speed."""
    samples = arm["samples_seconds"]
    return median(samples) if samples and arm["status"] == "ok" else None


def _share(arm: dict[str, Any], seconds: float | None, record: dict[str, Any]) -> str:
    copies = record["about"]["copy_bytes_per_second"]
    if seconds is None or not copies or record["resident"]:
        return "-"
    return f"{arm['moved_bytes'] / seconds / median(copies):.0%}"
