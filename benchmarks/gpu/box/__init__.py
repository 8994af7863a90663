"""The stages of a visit to a GPU machine: one file each, every one under ten minutes.

    check         the tests that need a GPU, and what the machine can do at best
    tune          launch configurations of this GPU, timed and written as a table
    kernels       every kernel against its peers (`kernels.py`)
    speculation   audits, kinds of work, the speed surface (`speculation.py`)
    models        real shapes with random weights: speed and memory by batch and by context
    quality       the same rows on trained models
    energy        joules a token, windows of half a minute

A stage is `run(job) -> int`, an exit code, and goes on where it was cut off. A new one is a file and
a line in `STAGES`.
"""

from __future__ import annotations

from benchmarks.gpu.box import check, energy, kernels, models, quality, speculation, tune
from benchmarks.gpu.box.job import Job

STAGES = {
    "check": check.run,
    "tune": tune.run,
    "kernels": kernels.run,
    "speculation": speculation.run,
    "models": models.run,
    "quality": quality.run,
    "energy": energy.run,
}

__all__ = ["STAGES", "Job"]
