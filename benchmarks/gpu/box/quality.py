"""The rows on trained models: the shipped tiny ones, and those whose folder was carried here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.box import suites

if TYPE_CHECKING:
    from benchmarks.gpu.box.job import Job

MODELS = ("tiny", "tiny:moe")


def run(job: Job) -> int:
    """Likelihood, distance from the dense model and its speed, on one model after the other."""
    done = suites.run(["quality"], job.models or MODELS, job)
    suites.show(done)
    return done.code()
