"""Build, check and time the arms of one entry."""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING, Any

import torch
from compresskit_kernels import dispatch

from benchmarks.gpu import timing
from benchmarks.gpu.arms import Absent

if TYPE_CHECKING:
    from benchmarks.gpu.arms import Arm, Entry
    from benchmarks.gpu.stages import Settings


@torch.inference_mode()
def run(entry: Entry, settings: Settings) -> list[dict[str, Any]]:
    """One document per arm; an arm that fails says why and stops no other."""
    expected = entry.expected().float()
    return [_run(arm, entry, expected, settings) for arm in entry.arms]


def _run(arm: Arm, entry: Entry, expected: torch.Tensor, settings: Settings) -> dict[str, Any]:
    count = 1 if settings.is_dry else timing.copies(arm.moved_bytes)
    about: dict[str, Any] = {
        "name": arm.name,
        "note": arm.note,
        "moved_bytes": arm.moved_bytes,
        "status": "ok",
        "reason": None,
        "error": None,
        "error_limit": arm.error_limit,
        "copies": count,
        "samples_seconds": None,
    }
    dispatch.reset()
    try:
        calls = arm.build(1 if entry.resident else count)
        about["copies"] = len(calls)
        got = arm.observe(calls[0]()).float()
        about["ran"] = dispatch.used()
        if arm.error_limit is not None:
            expected = expected if arm.expected is None else arm.expected().float()
            error = float((got - expected).norm() / expected.norm())
            about["error"] = error if math.isfinite(error) else None
            if not error <= arm.error_limit:
                about |= {"status": "wrong", "reason": f"off by {error:.1e} of the reference"}
        if not settings.is_dry:
            timed = timing.measure(calls)
            about |= {
                "samples_seconds": timed.samples,
                "calls_per_sample": timed.calls_per_sample,
                "graph": timed.graph,
            }
    except Absent as missing:
        about |= {"status": "absent", "reason": str(missing)}
    except Exception as error:  # noqa: BLE001 - peers fail in their own ways; the record says how
        about |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    finally:
        calls = got = None  # type: ignore[assignment]
        if not settings.is_dry:
            gc.collect()
            torch.cuda.empty_cache()
    return about
