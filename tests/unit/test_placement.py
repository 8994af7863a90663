"""A model on more than one device: same answers, told where it lies, and refused what cannot be done."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compresskit import artefact as artefacts, catalogue, runner, stack
from compresskit.cli import options
from compresskit.device import Device, synchronizer
from compresskit.engines.native import Native
from compresskit.errors import Conflict, SpecError
from compresskit.hf import placement
from compresskit.hf.sources import cache as sources_cache
from compresskit.measure.memory import weights
from compresskit.measure.memory.peaks import PeakMeter
from compresskit.measure.memory.vram import ProcessVram
from compresskit.record import Record
from compresskit.report import join, table
from compresskit.spec import PlacementSpec, RunSpec, SamplingSpec
from compresskit.sweep import _comparable
from compresskit.system import Request

HOST_GB = 0.0026
"""Of the 3.4 MB of `tiny`: the embedding and one of two blocks fit, the rest goes to disk."""
RANDOM = "random:llama-3.2-1b:layers=3,divide=16,vocabulary=512"
RECORD = Path(__file__).parents[2] / "results"


def spec(*methods, model="tiny", host_gb=HOST_GB, mode="eager", **changes) -> RunSpec:
    placed = None if host_gb is None else {"how": "spread", "host_gb": host_gb}
    return RunSpec().replace(
        model={"name": model},
        device="cpu",
        engine={"mode": mode, "placement": placed},
        stack=[catalogue.parse_method(one) for one in methods],
        workload={"prompt_tokens": 12, "new_tokens": 6},
        protocol={"passes": ["latency", "memory", "quality"], "repeats": 1, "warmups": 0},
        quality={"windows": 1, "prefill": 8, "continuation": 4, "greedy_prompts": 1},
        **changes,
    )


def greedy(system, new=12) -> list[int]:
    ids = torch.arange(5, 25).unsqueeze(0)
    request = Request(ids, new, SamplingSpec())
    return torch.cat([chunk.tokens for chunk in system.generate(request)], dim=1)[0].tolist()


def opened(one: RunSpec):
    return artefacts.opened(artefacts.plan(one))


@pytest.mark.parametrize(
    "methods", [(), ("kv/int8",), ("kv/sink_window:window=8,sink=2",), ("speculative/ngram",)]
)
def test_tokens_are_those_of_the_model_in_one_place(methods):
    with opened(spec(*methods, host_gb=None)) as whole:
        expected = greedy(whole.system)
    with opened(spec(*methods)) as spread:
        assert greedy(spread.system) == expected
        # Not because it lay in one place after all.
        assert {"cpu", "disk"} <= set(spread.system.facts["placement"]["holds"])
    assert len(set(expected)) > 3
