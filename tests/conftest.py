"""Shared by all tests: offline, one thread, and the shipped tiny model opened through the product."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.artefact import Opened


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two OpenMP threads on a contended core wait at every barrier."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def open_stack():
    """Return `open_stack("family/name:key=value", ..., model=...)`, a context manager of `Opened`."""

    @contextmanager
    def opening(*methods: str, model: str = "tiny", mode: str = "eager") -> Iterator[Opened]:
        from compresskit import artefact as artefacts, catalogue
        from compresskit.spec import EngineSpec, ModelSpec, RunSpec

        spec = RunSpec(
            model=ModelSpec(name=model),
            device="cpu",
            engine=EngineSpec(mode=mode),
            stack=tuple(catalogue.parse_method(text) for text in methods),
        )
        with artefacts.opened(artefacts.plan(spec)) as opened:
            yield opened

    return opening
