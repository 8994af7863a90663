"""The stages: each lists the entries of some operations, nothing is built before its turn.

A new stage is a file with `entries(settings)` and a line in `STAGES`.
"""

from __future__ import annotations

from benchmarks.gpu.stages import attention, dynamic, fused, weight_only
from benchmarks.gpu.stages.settings import Settings

STAGES = {
    "weight_only": weight_only.entries,
    "dynamic": dynamic.entries,
    "attention": attention.entries,
    "fused": fused.entries,
}

__all__ = ["STAGES", "Settings"]
