"""Joules a token of prefill and of decoding: tick of the counter, idle power, windows of 30 s.

A row takes five windows of each kind, about six minutes, so two rows do not fit into ten: rows are
measured one after the other unless `--resident 2` and more minutes are given, and rows that did not
take turns get no verdict on their difference. The ratio that is printed is one of totals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.box import models, suites

if TYPE_CHECKING:
    from benchmarks.gpu.box.job import Job

MODELS = ("random:llama-3.1-8b",)


def run(job: Job) -> int:
    """The energy pass of every row at every batch size."""
    chosen = job.models or (models.DRY if job.is_dry else MODELS)
    done = suites.run(["energy"], chosen, job, paired=job.resident is not None)
    suites.show(done)
    return done.code()
