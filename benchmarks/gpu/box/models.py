"""Real shapes with random weights: speed and memory by batch and by context, never quality.

One session holds the dense row with CUDA graphs and two others: of an 8B model about all that can be
loaded, compiled for four batch sizes and measured in ten minutes. The mixture of experts is cut to
twelve of its 48 layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.box import suites

if TYPE_CHECKING:
    from benchmarks.gpu.box.job import Job

MODELS = (
    "random:llama-3.1-8b",
    "random:llama-3.2-1b",
    "random:qwen3-0.6b",
    "random:smollm2-135m",
    "random:qwen3-30b-a3b:layers=12",
)
TRIAL = "layers=1,divide=16,vocabulary=512"
DRY = (f"random:llama-3.1-8b:{TRIAL}",)
CONTEXT = ("random:llama-3.1-8b",)
"""Where caches weigh as much as weights."""
RESIDENT = 3


def run(job: Job) -> int:
    """Every row on every shape, then caches of codes on the largest one."""
    models = job.models or (DRY if job.is_dry else MODELS)
    long = job.models or (DRY if job.is_dry else CONTEXT)
    parts = [
        suites.run(["models"], models, job, resident=RESIDENT),
        suites.run(["context"], long, job, resident=RESIDENT),
    ]
    for part in parts:
        suites.show(part)
    return max(part.code() for part in parts)
