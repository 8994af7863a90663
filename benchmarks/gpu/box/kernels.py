"""Kernels against their peers: `benchmarks/gpu/kernels.py`, in a folder of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu import kernels

if TYPE_CHECKING:
    from benchmarks.gpu.box.job import Job


def run(job: Job) -> int:
    """Check and time every kernel."""
    words = ["--out", str(job.out / "kernels"), "--minutes", str(job.minutes)]
    if job.without:
        words += ["--without", ",".join(job.without)]
    return kernels.main([*words, *(["--dry-run"] if job.is_dry else [])])
