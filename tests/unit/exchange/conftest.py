"""Records with given arrivals, and other tools' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compresskit import store
from compresskit.record import Arrival, Record, Sample

TESTS = Path(__file__).parents[2]
FOREIGN = TESTS / "golden" / "exchange" / "foreign"
RECORDS = TESTS / "golden" / "records" / "v2"


def golden(name: str) -> Record:
    return store.load(RECORDS / f"synthetic-{name}.json")


def record_of(
    *requests: list[tuple[float, int]], prompt: int = 8, batch: int = 1, **sample: Any
) -> Record:
    """The synthetic dense record with other repetitions in its latency pass, and no others."""
    record = golden("dense")
    block = record.blocks[0]
    samples = tuple(
        Sample(arrivals=tuple(Arrival(*mark) for mark in marks), forwards=len(marks), **sample)
        for marks in requests
    )
    probe = block.passes.latency.model_copy(
        update={"samples": samples, "prompt_tokens": prompt, "batch": batch}
    )
    passes = block.passes.model_copy(update={"latency": probe, "throughput": None})
    return record.model_copy(
        update={"blocks": (block.model_copy(update={"passes": passes, "turns": ()}),)}
    )


VECTOR_1 = [(0.100, 1), (0.140, 3), (0.180, 1)]


@pytest.fixture
def vector_1() -> Record:
    """Chunks at 100, 140 and 180 ms that carry 1, 3 and 1 tokens."""
    return record_of(VECTOR_1)
