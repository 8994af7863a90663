"""Speculative decoding: `benchmarks/gpu/speculation.py` on the first model named, `tiny` by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu import speculation

if TYPE_CHECKING:
    from benchmarks.gpu.box.job import Job


def run(job: Job) -> int:
    """Audits, kinds of work, the speed surface."""
    words = ["--out", str(job.out), "--minutes", str(job.minutes)]
    if job.models:
        words += ["--model", job.models[0]]
    return speculation.main([*words, *(["--dry-run"] if job.is_dry else [])])
